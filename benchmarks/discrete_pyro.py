"""Gradient estimators of a sigmoid belief net in Pyro, plain PyTorch and storchastic.

`candidates` trains one net and returns every estimator at a copy of it, for `discrete.py`.
Each candidate has the same route: its gradient with the host's `loss_and_grads`, then one Adam of
PyTorch, outside the parameter store.
"""

import copy
from functools import partial
from importlib.util import find_spec

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.infer import TraceGraph_ELBO
from torch import nn

from pyro_vae_ext.elbos import (
    TraceDisARM_ELBO,
    TraceNVIL_ELBO,
    TraceREBAR_ELBO,
    TraceRELAX_ELBO,
)

WIDTH = 200


def bits(logits):
    """One layer of independent bits."""
    return dist.Bernoulli(logits=logits).to_event(1)


class Net(nn.Module):
    """Parameters of model and guide, and both as programs."""

    def __init__(self, mean, num_layers):
        super().__init__()
        widths = (len(mean), *[WIDTH] * num_layers)
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        self.centre = mean
        self.prior = nn.Parameter(torch.zeros(WIDTH))
        self.up = nn.ModuleList(nn.Linear(a, b) for a, b in pairs)
        self.down = nn.ModuleList(nn.Linear(b, a) for a, b in pairs)
        for layer in (*self.up, *self.down):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.down[0].bias.data = mean.clamp(1e-3, 1 - 1e-3).logit()

    def model(self, x):
        """Latent layers `h2`, `h1`, then the pixels."""
        with pyro.plate("data", len(x)):
            logits = self.prior
            for i, down in reversed(list(enumerate(self.down, 1))):
                logits = down(pyro.sample(f"h{i}", bits(logits)))
            pyro.sample("x", bits(logits), obs=x)

    def guide(self, x, infer=None):
        """Latent layers `h1`, `h2`; `infer` gives the site's `infer` from its name."""
        infer = infer or (lambda name, x: {"baseline_input": x})
        h = x - self.centre
        with pyro.plate("data", len(x)):
            for i, up in enumerate(self.up, 1):
                name = f"h{i}"
                h = pyro.sample(name, bits(up(h)), infer=infer(name, x))


class Candidate:
    """One estimator at a copy of the trained net.

    Args:
        net: the trained net; it is copied.
        batches: function of nothing that returns a batch of rows.
        make: function of the copy that returns `backward`, a function of a batch that leaves the
            gradients in place, and a list of modules: what the estimator learns for itself.
        factor: of the gradients, to make them those of a sum over rows.
    """

    def __init__(self, net, batches, make, factor=1.0, learning_rate=1e-3):
        self.net, self.batches, self.factor = copy.deepcopy(net), batches, factor
        self.backward, self.modules = make(self.net)
        # Names of two estimators may be the same in the store.
        self.store = {"params": {}, "constraints": {}}
        self.batch = batches()
        self.learning_rate = learning_rate
        self.adam = None

    def _gradient(self, x):
        with pyro.get_param_store().scope(self.store) as self.store:
            self.backward(x)

    def _adam(self, parameters):
        return torch.optim.Adam(parameters, lr=self.learning_rate)

    def _tuning(self):
        return [p for module in self.modules for p in module.parameters()]

    def _clear(self):
        for parameter in (*self.net.parameters(), *self._tuning()):
            parameter.grad = None

    def tune(self, num_steps):
        """Train what the estimator learns for itself, the net held fixed."""
        self._gradient(self.batch)
        self._clear()
        parameters = self._tuning()
        adam = self._adam(parameters) if parameters else None
        # A running average alone has found its place after a few steps.
        for _ in range(num_steps if adam else min(num_steps, 100)):
            self._gradient(self.batches())
            if adam:
                adam.step()
            self._clear()
        self.adam = self._adam([*self.net.parameters(), *parameters])

    def variance(self, repetitions):
        """Trace of the covariance of the guide's gradient at one batch.

        Running averages stay those of the many batches before: rows that come again and again
        would each get to know their own.
        """
        mean = total = 0.0
        store = {name: dict(values) for name, values in self.store.items()}
        states = [copy.deepcopy(module.state_dict()) for module in self.modules]
        for n in range(1, repetitions + 1):
            self.store = {name: dict(values) for name, values in store.items()}
            for module, state in zip(self.modules, states, strict=True):
                module.load_state_dict(state)
            self._gradient(self.batch)
            flat = torch.cat([p.grad.detach().flatten() for p in self.net.up.parameters()]).double()
            self._clear()
            change = flat - mean
            mean = mean + change / n
            total += float(change @ (flat - mean))
        return self.factor**2 * total / (repetitions - 1)

    def step(self):
        """One training step: gradient and update of everything."""
        self._gradient(self.batch)
        self.adam.step()
        self.adam.zero_grad()


def log_bits(logits, h):
    """Log-density of a layer of bits, one number per row."""
    return -F.binary_cross_entropy_with_logits(logits, h, reduction="none").sum(-1)


def plain(net):
    """REINFORCE by hand, each layer with the terms that it has a part in."""

    def backward(x):
        h, values, log_q = x - net.centre, [x], []
        for up in net.up:
            logits = up(h)
            h = torch.bernoulli(torch.sigmoid(logits.detach()))
            values.append(h)
            log_q.append(log_bits(logits, h))
        cost = log_bits(net.prior.expand_as(h), h)
        for down, below, above in zip(net.down, values[:-1], values[1:], strict=True):
            cost = cost + log_bits(down(above), below)
        surrogate, known = cost, cost.detach()
        for term in reversed(log_q):
            known = known - term.detach()
            surrogate = surrogate + term * known
        (-surrogate.sum()).backward()

    return backward, []


def ours(make, net):
    """An objective of this package."""
    elbo = make()
    guide = elbo.tunable(net.guide)
    modules = [guide] if isinstance(guide, nn.Module) else []

    def backward(x):
        elbo.loss_and_grads(net.model, guide, x)

    return backward, modules


def baseline_net(width):
    """A network of the pixels, as that of `TraceNVIL_ELBO`: its head starts at zero."""
    net = nn.Sequential(nn.Linear(width, 100), nn.Tanh(), nn.Linear(100, 1), nn.Flatten(0))
    nn.init.zeros_(net[2].weight)
    nn.init.zeros_(net[2].bias)
    return net


def host(running, learned, net):
    """Pyro's own objective with its running and network baselines."""
    elbo = TraceGraph_ELBO()
    networks = nn.ModuleDict(
        {f"h{i}": baseline_net(net.up[0].in_features) for i in range(1, len(net.up) + 1)}
        if learned
        else {}
    )

    def infer(name, x):
        baseline = {"use_decaying_avg_baseline": running}
        if learned:
            baseline |= {"nn_baseline": networks[name], "nn_baseline_input": x}
        return {"baseline": baseline} if running or learned else {}

    def backward(x):
        elbo.loss_and_grads(net.model, partial(net.guide, infer=infer), x)

    return backward, [networks]


def storchastic(kind, net):
    """The outside peer, one layer: score function with two samples, or RELAX."""
    import storch

    if kind == "RELAX":
        method = storch.method.RELAX("h1", in_dim=[WIDTH])
    else:
        method = storch.method.ScoreFunction("h1", n_samples=2, baseline_factory="batch_average")

    def backward(x):
        x = storch.denote_independent(x, 0, "data")
        logits = net.up[0](x - net.centre)
        h = method(torch.distributions.Bernoulli(logits=logits))
        log_q = (h * logits - F.softplus(logits)).sum(-1)
        log_p = (h * net.prior - F.softplus(net.prior)).sum(-1)
        pixels = net.down[0](h)
        log_x = (x * pixels - F.softplus(pixels)).sum(-1)
        storch.add_cost(log_q - log_p - log_x, "negative ELBO")
        storch.backward()

    return backward, [method]


def objectives(num_layers):
    """Named functions of a net, the hand-written one first."""
    found = {
        "plain PyTorch, REINFORCE": plain,
        "REINFORCE": partial(ours, lambda: TraceNVIL_ELBO(baselines=())),
        "NVIL": partial(ours, TraceNVIL_ELBO),
        "leave-one-out, 2 particles": partial(
            ours, lambda: TraceNVIL_ELBO(2, baselines=("leave_one_out",))
        ),
        "DisARM": partial(ours, TraceDisARM_ELBO),
        "REBAR": partial(ours, TraceREBAR_ELBO),
        "RELAX": partial(ours, TraceRELAX_ELBO),
        "TraceGraph_ELBO": partial(host, False, False),
        "TraceGraph_ELBO, decaying average": partial(host, True, False),
        "TraceGraph_ELBO, average and network": partial(host, True, True),
    }
    if num_layers == 1 and find_spec("storch"):
        found["storchastic, leave-one-out, 2"] = partial(storchastic, "leave-one-out")
        found["storchastic, RELAX"] = partial(storchastic, "RELAX")
    return found


def left_out(args):
    """Why candidates are missing, one sentence each."""
    if args.num_layers > 1:
        return ["storchastic: one layer only."]
    return [] if find_spec("storch") else ["storchastic: not installed."]


def candidates(args, rows):
    """Train one net with REBAR, then every estimator at a copy of it."""
    pyro.clear_param_store()
    pyro.enable_validation(False)
    pyro.set_rng_seed(args.seed)
    torch.set_num_threads(1)
    rows = torch.from_numpy(rows)

    def batches():
        return rows[torch.randint(len(rows), (args.batch_size,))].float()

    net = Net(rows.float().mean(0), args.num_layers)
    trainer = Candidate(net, batches, partial(ours, TraceREBAR_ELBO))
    trainer.tune(0)
    for _ in range(args.train_steps):
        trainer.batch = batches()
        trainer.step()
    made = {}
    for name, make in objectives(args.num_layers).items():
        # The peer averages over rows, all others sum.
        factor = args.batch_size if name.startswith("storchastic") else 1.0
        made[name] = Candidate(trainer.net, batches, make, factor)
        made[name].batch = trainer.batch
    return made
