"""Suite `fit`: `training.fit` of NumPyro against a bare scan over the host's update.

The programs are those of `fit_numpyro.py`; a row is the time of one step.
"""

import cells


def rows(backend, options):
    """Rows of the suite, and what is missing."""
    import fit_numpyro
    import jax.numpy as jnp
    import numpyro
    import steps_numpyro
    from sizes import TINY

    from numpyro_vae_ext.elbos import ImportanceWeightedELBO

    numpyro.enable_validation(False)
    chosen = {"tiny": (TINY, 7, 1)} if options.smoke_test else fit_numpyro.CASES
    found = []
    for model, (sizes, num_rows, epochs) in chosen.items():
        epochs = max(1, epochs // 4) if options.quick else epochs
        update, state = steps_numpyro.svi(ImportanceWeightedELBO(), sizes)
        data = jnp.asarray(
            cells.images(options._replace(data_dir=None), num_rows, sizes.num_pixels)
        )
        given = (update.__self__, state, data, sizes.batch, epochs)
        programs = {"vae-ext, fit": fit_numpyro.fitted(*given)}
        if not options.smoke_test:
            programs = {"bare scan": fit_numpyro.bare(*given), **programs}
            programs["vae-ext, fit, guarded"] = fit_numpyro.fitted(*given, guarded=True)
            programs["vae-ext, fit, callbacks"] = fit_numpyro.fitted(
                *given, callbacks=(lambda *_: False,)
            )
            programs["vae-ext, fit, streamed"] = fit_numpyro.fitted(*given, resident=False)
        steps = epochs * -(-num_rows // sizes.batch)
        # A turn of hundreds of steps stands for many turns of a few.
        rounds = min(options.rounds, 15)
        for row in cells.take_turns(programs, options._replace(rounds=rounds), model=model):
            row["rounds"] = [float(f"{value / steps:.5g}") for value in row["rounds"]]
            found.append({**row, "microseconds": round(row["microseconds"] / steps, 2)})
    return found, []
