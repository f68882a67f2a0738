"""TensorFlow Probability's inverse autoregressive flow, timed by `suite_flows.py`.

Runs in an environment of its own (`pip install tensorflow tf-keras tensorflow-probability`), on
one thread. Its options come as JSON in the first argument. It writes a line of JSON with its
sizes; then, for each line that it reads, it runs the program of that name and writes `true`:

    sample    samples with their log-density
    gradient  the gradient of the bound through them, in all weights

Each is one `tf.function`, through XLA where the options say `"xla": true`.
"""

import json
import os
import sys

os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", TF_USE_LEGACY_KERAS="1", CUDA_VISIBLE_DEVICES="-1")

import numpy as np
import tensorflow as tf
import tensorflow_probability as tfp

tfb, tfd = tfp.bijectors, tfp.distributions


def programs(dim, context_dim, hidden_dims, num_flows, batch, xla):
    """The flow's sizes, and its programs by name."""
    context = tf.random.stateless_normal((batch, context_dim), seed=(0, 1))
    steps = []
    for i in range(num_flows):
        net = tfb.AutoregressiveNetwork(
            params=2,
            event_shape=[dim],
            conditional=True,
            conditional_event_shape=[context_dim],
            hidden_units=list(hidden_dims),
            activation="relu",
        )
        # A masked flow scores in one pass; inverted, it samples in one pass.
        steps.append(tfb.Invert(tfb.MaskedAutoregressiveFlow(net, name=f"step{i}"), name=f"i{i}"))
        steps.append(tfb.Permute(list(range(dim))[::-1]))
    flow = tfb.Chain(steps[:-1][::-1])
    options = {f"i{i}": {"conditional_input": context} for i in range(num_flows)}
    base = tfd.MultivariateNormalDiag(tf.zeros((batch, dim)), tf.ones((batch, dim)))

    def draw():
        noise = base.sample()
        z = flow.forward(noise, **options)
        return z, base.log_prob(noise) - flow.forward_log_det_jacobian(noise, 1, **options)

    @tf.function(jit_compile=xla)
    def sample():
        return draw()

    draw()
    weights = flow.trainable_variables

    @tf.function(jit_compile=xla)
    def gradient():
        with tf.GradientTape() as tape:
            z, log_q = draw()
            loss = tf.reduce_mean(log_q + 0.5 * tf.reduce_sum(tf.square(z - 1.0), -1))
        return tape.gradient(loss, weights)

    described = {
        "parameters": int(sum(np.prod(v.shape) for v in weights)),
        "versions": {"tensorflow": tf.__version__, "tensorflow-probability": tfp.__version__},
    }
    return described, {"sample": sample, "gradient": gradient}


if __name__ == "__main__":
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    # What TensorFlow prints of its own must not come between the lines of JSON.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    described, named = programs(**json.loads(sys.argv[1]))
    print(json.dumps(described), file=answers, flush=True)
    for line in sys.stdin:
        tf.nest.map_structure(lambda tensor: tensor.numpy(), named[line.strip()]())
        print("true", file=answers, flush=True)
