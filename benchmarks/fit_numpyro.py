"""Time of a step of `training.fit` in NumPyro against a bare loop over the host's update.

    python benchmarks/fit_numpyro.py

The bare loop is what one writes by hand: one compiled program with a `lax.scan` over epochs, each
with a new order of the rows and a `lax.scan` of `svi.update` over its batches, the last one of
which has fewer rows on the digits. No loss is looked at before its end. `fit` runs the same steps
in calls of about a thousand; it checks that all numbers are finite and keeps the history. "guarded"
is `fit` after a gradient that was not finite, when it looks at each, "callbacks" is `fit` with a
function called at every epoch, and "streamed" `fit` with `resident=False`. Compilation is not part
of any.

Both train the same networks with Adam and `ImportanceWeightedELBO` at one particle, in one thread.
The candidates take turns; a ratio is the median, over the rounds, of a candidate's time over that
of the bare loop in the same round.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from sizes import DIGITS, MNIST
from step_time import ONE_THREAD, measure

# Sizes of the networks and the batch, rows, and epochs of one turn.
CASES = {
    "digits, 64-100-100-10": (DIGITS, 1437, 200),
    "images, 784-200-200-50": (MNIST, 2000, 20),
}


def bare(svi, state, data, batch_size, epochs):
    """A callable that trains for so many more epochs with nested scans."""
    import jax

    rows = len(data)
    full = rows - rows % batch_size

    @jax.jit
    def train(state, data, key):
        def epoch(state, key):
            order = jax.random.permutation(key, rows)
            batches = order[:full].reshape(-1, batch_size)
            state, losses = jax.lax.scan(lambda s, i: svi.update(s, data[i]), state, batches)
            if full < rows:
                state, _ = svi.update(state, data[order[full:]])
            return state, losses

        return jax.lax.scan(epoch, state, jax.random.split(key, epochs))

    held = [state, jax.random.key(1)]

    def turn():
        held[1], key = jax.random.split(held[1])
        held[0], losses = train(held[0], data, key)
        jax.block_until_ready(losses)

    return turn


def fitted(svi, state, data, batch_size, epochs, *, guarded=False, callbacks=(), resident=True):
    """A callable that lets one and the same `fit` go on for so many more epochs."""
    import jax

    from numpyro_vae_ext.training import _data
    from numpyro_vae_ext.training._engine import Engine
    from numpyro_vae_ext.training._run import Options, Run

    source = _data.read(data, batch_size, shuffle=True, drop_last=False)
    options = Options(epochs, 1, None, 0.0, callbacks, 100, None, None, resident)
    run = Run(jax.random.key(0), Engine(svi, {}, {}), source, None, options)
    run.now["guarded"] = True if guarded else None
    run.start(state, resume=False)

    def turn():
        run.options = run.options._replace(num_epochs=len(run.history) + epochs)
        run.train(progress_bar=False)

    return turn


def main(args):
    """Time both sizes and print a table; return the rows."""
    import jax.numpy as jnp
    import numpy as np
    import numpyro
    import steps_numpyro

    from numpyro_vae_ext.elbos import ImportanceWeightedELBO

    numpyro.enable_validation(False)
    results = []
    print(f"{'case':24}  {'program':12}  {'us/step':>9}  {'ratio':>6}")
    for case, (sizes, rows, epochs) in CASES.items():
        epochs = 2 if args.smoke_test else args.epochs or epochs
        update, state = steps_numpyro.svi(ImportanceWeightedELBO(), sizes=sizes)
        bits = np.random.default_rng(0).random((rows, sizes.num_pixels)) < 0.3
        given = (update.__self__, state, jnp.asarray(bits, jnp.float32), sizes.batch, epochs)
        programs = {
            "bare": bare(*given),
            "fit": fitted(*given),
            "guarded": fitted(*given, guarded=True),
            "callbacks": fitted(*given, callbacks=(lambda *_: False,)),
            "streamed": fitted(*given, resident=False),
        }
        steps = epochs * -(-rows // sizes.batch)
        for name, result in measure(programs, args.rounds, 1, 1).items():
            result["microseconds"] /= steps
            results.append({"case": case, "program": name, **result})
            print(
                f"{case:24}  {name:12}  {result['microseconds']:>9.1f}  {result['ratio']:>6.3f}",
                flush=True,
            )
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--epochs", type=int, help="epochs of one turn")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--smoke-test", action="store_true")
    if any(os.environ.get(name) != value for name, value in ONE_THREAD.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ONE_THREAD})
    parsed = parser.parse_args()
    parsed.rounds = 2 if parsed.smoke_test else parsed.rounds
    main(parsed)
