"""Suite `flows`: the inverse autoregressive flow against those of other libraries.

`sample` is a batch of samples with their log-density, `gradient` the gradient of a bound through
them, both at D = 50. `score` is the log-density of a value whose noise is unknown, at D = 256, with
networks far from their start near the identity; "one pass a coordinate" inverts our own flow that
way. The affine steps, our default, stand against the peers'; the gated ones beside them.
"""

import contextlib
import importlib
from functools import partial

import cells
from likelihoods import Peer
from sizes import FLOW, TINY_FLOW, WIDE_FLOW

TFP = {"TFP": False, "TFP, XLA": True}


def rows(backend, options):
    """Rows of the suite, and what is missing."""
    module = importlib.import_module(f"flows_{backend}")
    sizes = TINY_FLOW if options.smoke_test else FLOW
    wide = TINY_FLOW if options.smoke_test else WIDE_FLOW
    kinds, missing = module.programs(sizes)
    found = []
    with contextlib.ExitStack() as stack:
        peers = {}
        # Another process's time is seen by the clock alone.
        if options.peer_python and not options.cpu_time:
            for name, xla in TFP.items():
                settings = {**sizes._asdict(), "xla": xla}
                peers[name] = Peer(options.peer_python, settings, "flows_tfp.py")
                stack.callback(peers[name].close)
        else:
            missing = [*missing, "TFP"]
        if options.smoke_test:
            named = kinds["sample"]
            kinds = {"sample": {name: named[name] for name in ("vae-ext", list(named)[-1])}}
        for kind, named in kinds.items():
            steps = named | {name: partial(peer.run, kind) for name, peer in peers.items()}
            found += cells.take_turns(steps, options, kind=kind, D=sizes.dim, batch=sizes.batch)
    named, gap = module.scoring(wide)
    labels = {"kind": "score", "D": wide.dim, "batch": wide.batch, "relative_gap": gap}
    return found + cells.take_turns(named, options, **labels), missing
