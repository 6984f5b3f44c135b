"""Strict settings for all tests; they have to be made before jax starts its devices."""

from dreamerv3_jax import cpu

cpu.prepare()

import hypothesis  # noqa: E402
import jax  # noqa: E402

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 4)  # for the tests of sharding; others use the first
jax.config.update('jax_numpy_rank_promotion', 'raise')

# The same examples in every run, and no deadline, because a first call may compile.
hypothesis.settings.register_profile(
    'tests', max_examples=25, deadline=None, derandomize=True, database=None
)
hypothesis.settings.load_profile('tests')
