"""One of the processes that ``test_distributed.py`` starts; writes what it found as JSON.

Each has four devices. The reference is one device with all rows and the same key.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from numpyro import handlers
from numpyro.contrib.module import nnx_module
from numpyro.infer import SVI
from test_numpyro.models import difference, family, largest, module_params, shaken

from numpyro_vae_ext.elbos import ImportanceWeightedELBO

NUM_ROWS, BATCH, LATENT, CONTEXT, PIXELS = 40, 16, 3, 4, 6
FAMILIES = {"MeanField": {}, "IAF": {"hidden_dims": (7,)}}
OBJECTIVES = {
    "MeanField": [(1, "reparam"), (5, "dreg")],
    "IAF": [(5, "reparam"), (5, "dreg")],
}


def pair(name: str) -> tuple[Any, Any, dict[str, Any]]:
    rngs = nnx.Rngs(0)
    decoder, encoder = nnx.Linear(LATENT, PIXELS, rngs=rngs), nnx.Linear(PIXELS, CONTEXT, rngs=rngs)
    posterior = family(name, latent_dim=LATENT, context_dim=CONTEXT, **FAMILIES[name])

    def model(x: jax.Array) -> None:
        decode = nnx_module("decoder", decoder)
        with numpyro.plate("data", NUM_ROWS, subsample_size=len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(LATENT), 1.0).to_event(1))
            numpyro.sample("x", dist.Bernoulli(logits=decode(z)).to_event(1), obs=x)

    def guide(x: jax.Array) -> jax.Array:
        encode, draw = nnx_module("encoder", encoder), nnx_module("posterior", posterior)
        with numpyro.plate("data", NUM_ROWS, subsample_size=len(x)):
            return draw("z", jnp.tanh(encode(x)))

    params = module_params(decoder=decoder, encoder=encoder, posterior=posterior)
    return model, guide, shaken(params)


def everything(x: jax.Array) -> dict[str, Any]:
    """Losses and gradients, draws, and the parameters after some steps, all from one key."""
    key = jax.random.key(3)
    found: dict[str, Any] = {}
    for name in FAMILIES:
        model, guide, params = pair(name)
        for k, gradient in OBJECTIVES[name]:
            elbo = ImportanceWeightedELBO(k, gradient=gradient)
            value = jax.value_and_grad(lambda p, e=elbo, m=model, g=guide: e.loss(key, p, m, g, x))
            found[f"{name} {gradient} K={k}"] = value(params)

    model, guide, params = pair("MeanField")
    seeded = handlers.seed(handlers.substitute(guide, data=params), key)
    found["draws"] = seeded(jnp.ones_like(x))
    # Not Adam: near a gradient of zero it divides rounding errors by rounding errors.
    svi = SVI(model, guide, numpyro.optim.SGD(1e-3), ImportanceWeightedELBO(5))
    state = svi.init(key, x)
    state, losses = jax.lax.scan(lambda state, _: svi.update(state, x), state, length=3)
    found["training"] = losses, svi.get_params(state)
    return found


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Largest difference, relative to the largest number."""
    ours, theirs = jax.device_get((ours, theirs))
    return {name: difference(ours[name], theirs[name]) / largest(theirs[name]) for name in theirs}


def main(rank: int, folder: Path, address: str) -> None:
    jax.distributed.initialize(address, 2, rank, initialization_timeout=120)
    rows = np.random.default_rng(0).integers(0, 2, (BATCH, PIXELS)).astype(jnp.result_type(float))
    whole = Mesh(np.array(jax.devices()), ("data",))
    mine = np.split(rows, 2)[rank]
    x = jax.make_array_from_process_local_data(NamedSharding(whole, P("data")), mine)
    run = partial(jax.jit, everything)
    ours = jax.device_get(run(out_shardings=NamedSharding(whole, P()))(x))

    found: dict[str, Any] = {"devices": len(jax.devices()), "rows": x.sharding.shard_shape(x.shape)}
    if rank == 0:
        theirs = run()(jax.device_put(rows, jax.local_devices()[0]))
        found["processes"] = compare(ours, theirs)
        local = NamedSharding(Mesh(np.array(jax.local_devices()), ("data",)), P("data"))
        found["local"] = compare(run()(jax.device_put(rows, local)), theirs)
        z = ours["draws"]
        apart = np.abs(z[:, None] - z[None]).max(-1)
        found["closest draws"] = float(apart[~np.eye(BATCH, dtype=bool)].min())
    (folder / f"{rank}.json").write_text(json.dumps(found))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
