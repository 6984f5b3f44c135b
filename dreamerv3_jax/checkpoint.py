"""Checkpoints of a run: train state, replay and counters in one atomic step of an orbax manager."""

from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import jax
import orbax.checkpoint as ocp

from dreamerv3_jax.errors import UserError
from dreamerv3_jax.train_state import TrainState

KEEP = 2


def latest_step(folder: Path) -> int | None:
    """Step of the newest complete checkpoint in a folder, which is not touched."""
    steps = [int(path.name) for path in folder.glob('*') if path.name.isdigit()]
    return max(steps, default=None)


class Saved(NamedTuple):
    """What a checkpoint holds."""

    state: TrainState
    replay: dict[str, Any] | None  # as from `Replay.state`
    counters: dict[str, Any]  # JSON


class Checkpointer:
    """Writes and reads the checkpoints in one folder; the newest `KEEP` are kept."""

    def __init__(self, folder: Path) -> None:
        """Opens the folder, making it if it is missing."""
        options = ocp.CheckpointManagerOptions(max_to_keep=KEEP, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, step: int, saved: Saved) -> None:
        """Writes a checkpoint; when this returns it is complete on disk."""
        if step in self._manager.all_steps():
            return
        items: dict[str, Any] = {'state': ocp.args.StandardSave(saved.state)}
        counters = dict(saved.counters)
        if saved.replay is not None:
            arrays = {quote(name, safe=''): array for name, array in saved.replay['arrays'].items()}
            items['replay'] = ocp.args.StandardSave(arrays)
            counters['replay'] = saved.replay['metadata']
        items['counters'] = ocp.args.JsonSave(counters)
        self._manager.save(step, args=ocp.args.Composite(**items))
        self._manager.wait_until_finished()

    def restore_state(self, abstract: TrainState) -> TrainState:
        """Reads the newest train state onto the shardings of `abstract`.

        Raises:
          UserError: the checkpoint is of another network.
        """
        step = self._manager.latest_step()
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        try:
            return self._manager.restore(step, args=args)['state']
        except ValueError as error:
            reason = ' '.join(str(error).split())[:200]
            raise UserError(f'The checkpoint {step} does not fit this agent: {reason}') from error

    def restore(self, abstract: TrainState) -> Saved:
        """Reads the newest checkpoint."""
        step = self._manager.latest_step()
        names = {'counters': ocp.args.JsonRestore()}
        if (Path(self._manager.directory) / str(step) / 'replay').exists():
            names['replay'] = ocp.args.StandardRestore()
        items = self._manager.restore(step, args=ocp.args.Composite(**names))
        counters, replay = items['counters'], None
        if 'replay' in names:
            arrays = {unquote(name): array for name, array in items['replay'].items()}
            replay = {'arrays': arrays, 'metadata': counters.pop('replay')}
        return Saved(self.restore_state(abstract), replay, counters)

    def close(self) -> None:
        """Waits for pending work and lets go of the folder."""
        self._manager.close()


def abstract_state(state: Any) -> Any:
    """Shapes, dtypes and shardings of a state, to restore into."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
