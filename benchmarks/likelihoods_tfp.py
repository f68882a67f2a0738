"""TensorFlow Probability's PixelCNN, timed from outside by `likelihoods.py --peer-python`.

Runs in an environment of its own (`pip install tensorflow tf-keras tensorflow-probability`), on
one thread. Its options come as JSON in the first argument. It writes a line of JSON with its
sizes; then, for each line that it reads, it runs the program of that name and writes `true`:

    density  the log-density of the batch and its gradient in all weights
    pass     one pass of the network over the batch, of which the sampler takes H * W + 1
    sample   a batch of samples, with the sampler as it is

Each is one `tf.function`, through XLA where the options say `"xla": true`.
"""

import json
import os
import sys

os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", TF_USE_LEGACY_KERAS="1", CUDA_VISIBLE_DEVICES="-1")

import numpy as np
import tensorflow as tf
import tensorflow_probability as tfp


def programs(size, batch_size, context_dim, num_filters, num_components, xla):
    """The distribution's sizes, and its programs by name."""
    rng = np.random.default_rng(0)
    x = tf.constant(rng.integers(0, 256, (batch_size, size, size, 1)).astype("float32"))
    z = tf.constant(rng.standard_normal((batch_size, context_dim)).astype("float32"))
    model = tfp.distributions.PixelCNN(
        image_shape=(size, size, 1),
        conditional_shape=(context_dim,),
        # The shallowest that there is, at full resolution: it is the quickest.
        num_resnet=1,
        num_hierarchies=1,
        num_filters=num_filters,
        num_logistic_mix=num_components,
        dropout_p=0.0,
        # Weight normalisation and its start from data are for eager mode, which is far slower.
        use_weight_norm=False,
        use_data_init=False,
    )

    @tf.function(jit_compile=xla)
    def density():
        with tf.GradientTape() as tape:
            loss = -tf.reduce_mean(model.log_prob(x, conditional_input=z))
        return tape.gradient(loss, model.trainable_variables)

    @tf.function(jit_compile=xla)
    def one_pass():
        return model.network([x / 127.5 - 1.0, z], training=False)

    @tf.function(jit_compile=xla)
    def sample():
        return model.sample(batch_size, conditional_input=z)

    density()
    sizes = {
        "parameters": int(sum(np.prod(v.shape) for v in model.trainable_variables)),
        "versions": f"tensorflow {tf.__version__}, tensorflow-probability {tfp.__version__}",
    }
    return sizes, {"density": density, "pass": one_pass, "sample": sample}


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
