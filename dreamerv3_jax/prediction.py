"""What the world model foresees of replayed sequences, as pictures."""

from collections.abc import Mapping
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from dreamerv3_jax import rssm
from dreamerv3_jax.actions import flatten_actions
from dreamerv3_jax.config import AgentConfig
from dreamerv3_jax.networks import Networks, compute_dtype
from dreamerv3_jax.spaces import ArraySpec
from dreamerv3_jax.types import Array, Batch, Params, StoredLatent
from dreamerv3_jax.video_file import colours


class Prediction(NamedTuple):
    """Images of T steps and what the model made of them. [B, T, H, W, C] `uint8` each."""

    truth: Array
    prediction: Array
    difference: Array  # half the error above 127, which means that there is none


def open_loop(
    networks: Networks,
    params: Params,
    batch: Batch,
    key: chex.PRNGKey | None,
    *,
    observed: int,
    observation_specs: Mapping[str, ArraySpec],
    action_specs: Mapping[str, ArraySpec],
    config: AgentConfig,
) -> dict[str, Prediction]:
    """Shows the model the first steps of sequences; the rest it predicts from the actions alone.

    The stored latent of the context step is the initial state, as in an update. The first steps are
    reconstructions from posterior states. An episode that begins later is predicted from a blank
    state.

    Args:
      networks: all networks.
      params: of the dynamics, the encoder and the decoder at least.
      batch: [B, T + 1] steps.
      key: consumed here; None takes the most probable latents.
      observed: how many of the T steps are shown, from 1 to T - 1.
      observation_specs: of the observation.
      action_specs: of the action.
      config: settings.

    Returns:
      {name: `Prediction`} of each image that the agent observes.
    """
    chex.assert_rank([batch.reward, batch.is_first], 2)
    assert 0 < observed < batch.reward.shape[1] - 1, (observed, batch.reward.shape)
    observed_key, open_key = (None, None) if key is None else jax.random.split(key)
    dynamics, dynamics_params = networks.dynamics, params['dynamics']
    action = flatten_actions(jax.tree.map(lambda x: x[:, :-1], batch.action), action_specs)
    observation = jax.tree.map(lambda x: x[:, 1:], dict(batch.observation))
    is_first = batch.is_first[:, 1:]
    start = rssm.restore_latent(
        StoredLatent(batch.deter, batch.stoch), config, compute_dtype(config)
    )
    shown = jax.tree.map(lambda x: x[:, :observed], observation)
    seen = rssm.observe(
        dynamics,
        dynamics_params,
        start,
        action[:, :observed],
        networks.encoder(params['encoder'], shown),
        is_first[:, :observed],
        observed_key,
        unimix=config.unimix,
    ).latent
    foreseen = rssm.open_loop(
        dynamics,
        dynamics_params,
        jax.tree.map(lambda x: x[:, -1], seen),
        action[:, observed:],
        is_first[:, observed:],
        open_key,
        unimix=config.unimix,
    )
    latent = jax.tree.map(lambda *parts: jnp.concatenate(parts, 1), seen, foreseen)
    decoded = networks.decoder(params['decoder'], latent.deter, rssm.flat(latent.stoch))
    return {
        name: _compare(observation[name], decoded[name])
        for name, spec in observation_specs.items()
        if spec.kind == 'image'
    }


def _compare(truth: Array, decoded: Array) -> Prediction:
    prediction = jnp.rint(255 * decoded).astype(jnp.uint8)
    error = prediction.astype(jnp.int16) - truth.astype(jnp.int16)
    return Prediction(truth, prediction, ((error + 255) // 2).astype(jnp.uint8))


def video(predictions: Mapping[str, Prediction]) -> np.ndarray:
    """Arranges predictions as a film: truth, prediction and difference one above the other.

    Args:
      predictions: of images of one size, as `open_loop` returns them.

    Returns:
      [T, rows, columns, 3] `uint8`: one column for each of the B sequences; the three rows of the
      first image stand above those of the next.
    """
    rows = [colours(np.asarray(x)) for images in predictions.values() for x in images]
    film = np.concatenate(rows, -3)  # [B, T, rows, W, 3]
    return np.concatenate(list(film), -2)
