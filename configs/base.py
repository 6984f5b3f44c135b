"""Published values of every setting, and the sizes. All presets start from here.

One set of hyperparameters serves all domains; a preset changes the environment, the train ratio,
the run length and the size. Sizes differ in widths only.
"""

from collections.abc import Mapping
from typing import Any

import ml_collections

from dreamerv3_jax.errors import UserError

# name: (deter, hidden, classes, depth, units). The first two are for CPUs, the others published.
# `cpu` has wide layers around a small state: at the one learning rate a layer learns faster the
# wider it is, and on a CPU these learn the most per minute.
SIZES = {
    'nano': (256, 64, 4, 4, 64),
    'cpu': (256, 256, 4, 4, 256),
    'size1m': (512, 64, 4, 4, 64),
    'size12m': (2048, 256, 16, 16, 256),
    'size25m': (3072, 384, 24, 24, 384),
    'size50m': (4096, 512, 32, 32, 512),
    'size100m': (6144, 768, 48, 48, 768),
    'size200m': (8192, 1024, 64, 64, 1024),
    'size400m': (12288, 1536, 96, 96, 1536),
}
WIDTHS = ('deter', 'hidden', 'classes', 'depth', 'units')


def size_of(agent: Mapping[str, Any]) -> str:
    """Returns the size that has the widths of these settings of an agent, or 'own widths'."""
    widths = tuple(agent[name] for name in WIDTHS)
    return next((size for size, usual in SIZES.items() if usual == widths), 'own widths')


def get_config(size: str = 'size200m') -> ml_collections.ConfigDict:
    """Returns all settings with their published values at the given size.

    Raises:
      UserError: there is no such size.
    """
    if size not in SIZES:
        raise UserError(f'There is no size {size!r}; choose one of {", ".join(SIZES)}.')
    deter, hidden, classes, depth, units = SIZES[size]
    return ml_collections.ConfigDict(
        dict(
            seed=0,
            logdir='',  # '' means runs/<preset>-<environment>-<size>-seed<seed>
            size=size,
            env=dict(
                id='',  # a gymnasium id, dmc/..., atari/..., crafter/... or module:function
                kwargs=dict(),  # handed to the environment's constructor
                num_envs=16,
                repeat=1,  # environment frames per agent step
                image_size=0,  # side of the images in pixels; 0 keeps them where the network can
                vectorization='auto',  # auto, sync (in process), async (processes) or native
                autoreset='next_step',  # or same_step; native ones have their own way
                timeout=600.0,  # seconds; a process that takes longer to answer is replaced
            ),
            replay=dict(
                capacity=5_000_000,  # steps
                train_ratio=32.0,  # replayed steps per agent step
                batch_size=16,
                batch_length=64,
                online=True,  # fresh sequences are trained on once before uniform ones
                on_disk=False,  # memory map in the run folder instead of RAM
            ),
            run=dict(
                steps=1_000_000,  # environment frames, action repeat included
                log_every=10.0,  # seconds
                checkpoint_every=300.0,  # seconds
                checkpoint_replay=True,
            ),
            mesh=dict(  # of all devices, see docs/scaling.md
                data=-1,  # groups of them that see different sequences; -1 takes all there are
                fsdp=1,  # devices in a group, over which parameters and optimiser are spread
                acting=False,  # a device of each host acts only, by parameters one update old
            ),
            hosts=dict(  # SLURM, Kubernetes and TPU pods need none of them
                coordinator='',  # address:port of the first host
                count=0,  # 0 means as they are found, or this one alone
                index=0,  # of this one
            ),
            agent=dict(
                deter=deter,
                hidden=hidden,
                classes=classes,
                depth=depth,
                units=units,
                stoch=32,
                blocks=8,
                bins=255,
                encoder_layers=3,
                decoder_layers=3,
                prior_layers=2,
                posterior_layers=1,
                reward_layers=1,
                continue_layers=1,
                actor_layers=3,
                critic_layers=3,
                unimix=0.01,
                min_std=0.1,
                max_std=1.0,
                actor_output_scale=0.01,
                free_nats=1.0,
                reconstruction_scale=1.0,
                reward_scale=1.0,
                continue_scale=1.0,
                dynamics_scale=1.0,
                representation_scale=0.1,
                imagination_length=15,
                discount_horizon=333.0,
                return_lambda=0.95,
                entropy_scale=3e-4,
                actor_scale=1.0,
                critic_scale=1.0,
                replay_critic_scale=0.3,
                slow_critic_scale=1.0,
                slow_critic_rate=0.02,
                return_low_percentile=5.0,
                return_high_percentile=95.0,
                return_rate=0.01,
                return_limit=1.0,
                learning_rate=4e-5,
                warmup_updates=1000,
                gradient_clip=0.3,
                gradient_clip_floor=1e-3,
                momentum=0.9,
                rms_decay=0.999,
                rms_epsilon=1e-20,
                remat=False,  # slower updates in less memory
                compute_dtype='auto',  # bfloat16 on accelerators that have it, else float32
            ),
        )
    )
