"""Nine posteriors of posteriordb: their data, reference draws and the names of both.

Data and draws are those of github.com/stan-dev/posteriordb (release 1.0): of each posterior
`<data>.json` and `<draws>.npz` with `draws` (chains, draws, dimensions) and their `names`.
The eight schools need no file: ArviZ ships their data.
"""

import json
from pathlib import Path
from typing import NamedTuple

import data
import numpy as np


class Posterior(NamedTuple):
    """Files of one posterior, and where to start.

    `start` holds a value of every latent site, in the order of the model's statements. The
    search for the mode begins there; where the density has none, `scale` is the scale of the
    unconstrained latent variables.
    """

    data: str
    draws: str
    start: dict
    scale: np.ndarray | None = None


POSTERIORS = {
    "eight_schools": Posterior(
        "eight_schools",
        "eight_schools-eight_schools_noncentered",
        {"mu": 4.0, "tau": 3.0, "theta": np.full(8, 4.0)},
        # As tau falls to 0 the density grows without a bound.
        np.array([3.0, 1.0, *[5.0] * 8]),
    ),
    "arK": Posterior("arK", "arK-arK", {"alpha": 0.0, "beta": np.zeros(5), "sigma": 1.0}),
    "kidscore_momhsiq": Posterior(
        "kidiq", "kidiq-kidscore_momhsiq", {"beta": np.array([90.0, 0.0, 0.0]), "sigma": 20.0}
    ),
    "logearn_interaction": Posterior(
        "earnings",
        "earnings-logearn_interaction",
        {"beta": np.array([9.0, 0.0, 0.0, 0.0]), "sigma": 1.0},
    ),
    "gp_pois_regr": Posterior(
        "gp_pois_regr",
        "gp_pois_regr-gp_pois_regr",
        {"rho": 6.0, "alpha": 2.0, "f_tilde": np.zeros(11)},
    ),
    "hmm_example": Posterior(
        "hmm_example",
        "hmm_example-hmm_example",
        {
            "theta1": np.full(2, 0.5),
            "theta2": np.full(2, 0.5),
            "mu": np.array([3.0, 10.0]),
        },
    ),
    "nes1980": Posterior("nes1980", "nes1980-nes", {"beta": np.zeros(9), "sigma": 2.0}),
    "one_comp_mm_elim_abs": Posterior(
        "one_comp_mm_elim_abs",
        "one_comp_mm_elim_abs-one_comp_mm_elim_abs",
        {"k_a": 1.0, "K_m": 1.0, "V_m": 1.0, "sigma": 0.5},
    ),
    "lotka_volterra": Posterior(
        "hudson_lynx_hare",
        "hudson_lynx_hare-lotka_volterra",
        {
            "theta": np.array([0.5, 0.025, 0.8, 0.025]),
            "sigma": np.array([0.5, 0.5]),
            "z_init": np.array([30.0, 5.0]),
        },
    ),
}


def regression(outcome, *columns):
    """Design matrix with an intercept, and the outcome."""
    columns = np.broadcast_arrays(1.0, *map(np.asarray, columns))
    return {"design": np.stack(columns, 1).astype(float), "outcome": np.asarray(outcome, float)}


def arguments(name, data_dir=None):
    """What the model `name` is called with, as NumPy arrays of doubles."""
    if name == "eight_schools":
        schools = data.eight_schools()
        return {"error": schools.error.astype(float), "effect": schools.effect.astype(float)}
    if data_dir is None:
        raise ValueError(f"Expected --data-dir with the files of posteriordb for {name}; got none.")
    raw = json.loads((Path(data_dir) / f"{POSTERIORS[name].data}.json").read_text())
    if name == "arK":
        y, order = np.array(raw["y"]), raw["K"]
        lags = [y[order - k : len(y) - k] for k in range(1, order + 1)]
        return {"lags": np.stack(lags, 1), "y": y[order:]}
    if name == "kidscore_momhsiq":
        return regression(raw["kid_score"], raw["mom_hs"], raw["mom_iq"])
    if name == "logearn_interaction":
        height, male = np.array(raw["height"]), np.array(raw["male"])
        return regression(np.log(raw["earn"]), height, male, height * male)
    if name == "nes1980":
        age = np.array(raw["age_discrete"])
        ages = [age == group for group in (2, 3, 4)]
        rest = (raw[column] for column in ("educ1", "gender", "income"))
        return regression(raw["partyid7"], raw["real_ideo"], raw["race_adj"], *ages, *rest)
    if name == "gp_pois_regr":
        return {"x": np.array(raw["x"], float), "count": np.array(raw["k"], float)}
    if name == "hmm_example":
        return {"y": np.array(raw["y"])}
    if name == "one_comp_mm_elim_abs":
        return {
            "dose": raw["D"] / raw["V"],
            "volume": float(raw["V"]),
            "times": np.array(raw["times"]),
            "concentration": np.array(raw["C_hat"]),
        }
    years = np.array(raw["ts"])
    if not np.array_equal(years, np.arange(1, len(years) + 1)):
        raise ValueError(f"Expected hares and lynx of every year from 1 on; got years {years}.")
    return {"y": np.vstack([raw["y_init"], raw["y"]])}


def squared_exponential(x, alpha, rho):
    """Covariance of the latent Gaussian process, with Stan's jitter."""
    scaled = (x[:, None] - x) / rho[..., None, None]
    return alpha[..., None, None] ** 2 * np.exp(-0.5 * scaled**2) + 1e-10 * np.eye(len(x))


def comparable(name, columns):
    """The columns, with logarithms of those that have no variance to measure errors in.

    Far out elimination is linear and only the ratio of `V_m` and `K_m` matters, so that the two
    Cauchy priors leave a density that falls as `K_m^-3`.
    """
    if name != "one_comp_mm_elim_abs":
        return columns
    tails = {"K_m", "V_m"}
    return {
        f"log {k}" if k in tails else k: np.log(x) if k in tails else x for k, x in columns.items()
    }


def quantities(name, draws, arguments):
    """Draws of sites, `(n, *event)`, as one vector of length n per quantity to compare."""
    draws = {site: np.asarray(value, float) for site, value in draws.items()}
    if name == "gp_pois_regr":
        covariance = squared_exponential(np.asarray(arguments["x"]), draws["alpha"], draws["rho"])
        f = np.linalg.cholesky(covariance) @ draws["f_tilde"][..., None]
        draws = {"rho": draws["rho"], "alpha": draws["alpha"], "f": f[..., 0]}
    columns = {}
    for site, value in draws.items():
        if value.ndim == 1:
            columns[site] = value
        else:
            columns.update({f"{site}[{i + 1}]": value[:, i] for i in range(value.shape[1])})
    return comparable(name, columns)


def reference(name, data_dir):
    """Reference draws as one vector per quantity, or None where there is no file."""
    if data_dir is None:
        return None
    path = Path(data_dir) / f"{POSTERIORS[name].draws}.npz"
    with np.load(path) as file:
        draws, names = file["draws"], file["names"]
    columns = zip(map(str, names), draws.reshape(-1, len(names)).T, strict=True)
    return comparable(name, dict(columns))
