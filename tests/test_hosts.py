"""Several hosts, which are processes here, train like one, stop together, and go on as another
number of them."""

import collections
import contextlib
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time

import host
import jax
import numpy as np
import pytest
import test_loop
import test_sharding
import tiny_runs

from dreamerv3_jax import agreement, checkpoint, hosts, run_folder, sharding, startup
from dreamerv3_jax.agent import Agent
from dreamerv3_jax.agreement import Told
from dreamerv3_jax.configs import base
from dreamerv3_jax.errors import Failure, UserError
from dreamerv3_jax.loop import Trainer

pytestmark = pytest.mark.usefixtures('quick_compilation')


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def started(command, count, cache):
    """Runs a command, given the number of a host, on that many hosts; all end with the context."""
    variables = tiny_runs.quick_variables(cache) | {
        'JAX_PLATFORMS': 'cpu',
        'JAX_NUM_CPU_DEVICES': '1',
        'PYTHONPATH': os.path.dirname(__file__),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, *command(index)],
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for index in range(count)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def ended(processes):
    """Waits for all of them; returns what each wrote, and its exit code."""
    written = [process.communicate(timeout=200) for process in processes]
    return [(*texts, process.returncode) for texts, process in zip(written, processes, strict=True)]


def wait_for_training(folder, process, after=0.0):
    """Until an update is logged with a time after the given one; returns its time."""

    def times():
        path = folder / 'metrics.jsonl'
        lines = tiny_runs.read_metrics(folder) if path.exists() else []
        return [line['step'] for line in lines if 'train/loss/total' in line]

    test_loop.wait_for(lambda: times() and times()[-1] > after, process)
    return times()[-1]


@pytest.mark.medium
@pytest.mark.parametrize('count', [2, pytest.param(4, marks=pytest.mark.slow)])
def test_hosts_train_and_stop_together_and_one_goes_on(count, tmp_path, quick_compilation):
    arguments = (count, free_port(), tmp_path)
    with started(
        lambda index: [host.__file__, str(index), *map(str, arguments)], count, quick_compilation
    ) as processes:
        wait_for_training(tmp_path / 'run', processes[0])
        processes[-1].send_signal(signal.SIGTERM)  # to one of them
        results = ended(processes)
    for out, err, code in results:
        assert (code, err) == (143, ''), out + err
    assert 'Stopping after this update' in results[-1][0]
    assert 'Another host was told to stop' in results[0][0]
    check_updates(count, tmp_path)
    check_that_one_goes_on(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('counts', [(2, 4), (4, 4)])
def test_a_lost_host_ends_the_others(counts, tmp_path, quick_compilation):
    """By the command itself; then it goes on, with as many hosts or with more of them."""
    run, port = tmp_path / 'run', free_port()
    command = ['-m', 'dreamerv3_jax', 'train', '--config=quickstart']
    for start, count in enumerate(counts):
        configs = [host.config(index, count, port, tmp_path) for index in range(count)]
        commands = [[*command, *test_loop.flags(config)] for config in configs]
        before = tiny_runs.read_metrics(run)[-1]['step'] if start else 0
        with started(commands.__getitem__, count, quick_compilation) as processes:
            wait_for_training(run, processes[0], after=before)
            test_loop.wait_for(lambda: checkpoint.latest_step(run / 'checkpoints'), processes[0])
            processes[-1].kill()
            *others, _ = ended(processes)
        for out, err, code in others:
            assert code == 1, out + err
            *more, sentence = err.splitlines()
            assert re.match(LOST, sentence), err
            # JAX speaks above where it notices first: always to one that is no neighbour of the
            # lost one, and at a checkpoint, whose checksums are missing then.
            known = ('was taken unchecked', 'JAX distributed service')
            assert not more or count > 2 or any(text in err for text in known), err
        assert ('Going on at' in others[0][0]) == bool(start)
    check_that_one_goes_on(tmp_path)


# Where Python misses the other host, and where JAX aborts.
LOST = r'dreamerv3-jax: Another host is gone( \(|, or this process failed, for the reason above; )'
WAIT = """
import os, pathlib, sys
from jax._src import distributed
import host
from dreamerv3_jax import checkpoint, hosts
index, count, port = map(int, sys.argv[1:])
hosts.connect(host.config(index, count, port, pathlib.Path()).hosts)
hosts.gather(0)
if index == 0:
    os.kill(os.getpid(), 9)
with hosts.together(), checkpoint._silence():  # as orbax waits for others about a checkpoint
    distributed.global_state.client.wait_at_barrier('checkpoint', 100_000)
"""


@pytest.mark.medium
def test_a_host_ends_with_a_sentence_where_jax_would_abort_it(quick_compilation):
    """The first host is lost, which jax notices, while another waits for it in a barrier."""
    port = free_port()
    with started(lambda index: ['-c', WAIT, str(index), '3', str(port)], 3, quick_compilation) as x:
        first, *others = ended(x)
    assert first[2] == -signal.SIGKILL, first
    for _, err, code in others:
        assert code == 1, err
        last = err.splitlines()[-1]
        assert re.match(LOST, last), err
        assert last.endswith('to go on from the last checkpoint.')


def check_that_one_goes_on(folder):
    """With all that several hosts have seen."""
    config = host.config(0, 1, 0, folder)
    config.hosts.update(coordinator='', count=0)
    config.mesh.update(data=1, fsdp=1)
    with Trainer(config, folder / 'run', 'tiny') as trainer:
        counters = trainer.counters
        assert counters['ticks'] == checkpoint.latest_step(folder / 'run' / 'checkpoints') > 0
        records = trainer._replay.state()['arrays']
        np.testing.assert_array_equal(records['count'], counters['ticks'])
        ends = records['data/is_last'][:, :-1]
        assert ends.any() or counters['ticks'] < 50  # the hosts may have lost one early
        assert records['data/is_first'][:, 1:][ends].all()
        assert counters['steps'] == np.sum(~records['data/is_last'])
        updates = counters['updates']
        for _ in range(20):
            trainer.tick()
        assert counters['updates'] > updates
        # The first update came with the first batch; the steps until then are known but for a few.
        per_step = config.replay.train_ratio / (8 * tiny_runs.STEPS)
        made = (counters['steps'] - 8 * tiny_runs.STEPS) * per_step
        assert abs(counters['updates'] - made) <= 2


def check_updates(count, folder):
    """The updates that all hosts made are those of one."""
    agent = Agent.from_spaces(*test_sharding.SPACES, tiny_runs.agent_config())
    start = jax.tree.map(np.array, test_sharding.first_state(agent))
    _, *one = test_sharding.train(start, 1, 1)
    files = [folder / f'{index}.pickle' for index in range(count)]
    states, rows, metrics = zip(*(pickle.loads(file.read_bytes()) for file in files), strict=True)
    latents = jax.tree.map(lambda *parts: np.concatenate(parts), *rows)
    for state, values in zip(states, metrics, strict=True):
        test_sharding.check_same_training((state, latents, values), one)


# What hosts tell each other.


@pytest.fixture
def second_of_two(monkeypatch):
    """This is the second of two hosts; returns the list of what the first one tells, in order."""
    told = []
    monkeypatch.setattr(hosts, 'count', lambda: 2)
    monkeypatch.setattr(hosts, 'index', lambda: 1)
    monkeypatch.setattr(hosts, 'gather', lambda own: [told.pop(0), own])
    monkeypatch.setattr(hosts, 'gather_numbers', lambda own: np.stack([told.pop(0), own]))
    monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
    return told


def test_agreement(second_of_two):
    second_of_two.append(np.array(Told(steps=3, ready=1, episodes=1, log=1), np.int32))
    own = Told(steps=4, episodes=2, restarts=1, signal=15, save=1)
    assert agreement.agree(own) == Told(
        steps=7, ready=0, episodes=3, restarts=1, signal=15, failed=0, log=1, save=0
    )


def test_one_host_agrees_with_itself():
    own = Told(*range(1, 1 + len(Told._fields)))
    assert agreement.agree(own) == own
    assert hosts.gather({'a': 1}) == [{'a': 1}] and hosts.first(lambda: 5) == 5
    assert hosts.share(7, 'replay.batch_size') == 7


def test_what_the_first_host_says(second_of_two):
    told = [('The folder is in use.', 2), ('The disk is full.', 1)]
    second_of_two += [{'result': 20}, *({'error': text, 'code': code} for text, code in told)]
    assert hosts.first(pytest.fail) == 20
    for text, code in told:
        with pytest.raises(UserError, match=text) as error:
            hosts.first(pytest.fail)
        assert error.value in hosts._all_know and error.value.exit_code == code


def test_numbers_that_do_not_divide(second_of_two):
    assert hosts.share(6, 'env.num_envs') == 3
    with pytest.raises(UserError, match='config.env.num_envs=7 does not divide among 2 hosts'):
        hosts.share(7, 'env.num_envs')


def test_other_commands_are_refused(second_of_two):
    config, other = base.get_config('nano'), base.get_config('nano')
    other.hosts.index = 1
    second_of_two.append(other.to_dict())
    run_folder.check_hosts(config)
    other.seed = 3
    second_of_two.append(other.to_dict())
    with pytest.raises(UserError, match='config.seed is 3 on host 0 and 0 on host 1; .*count=1'):
        run_folder.check_hosts(config)


def test_hosts_with_other_numbers_of_devices_are_refused(second_of_two, monkeypatch):
    Device = collections.namedtuple('Device', 'process_index')
    monkeypatch.setattr(jax, 'devices', lambda: [Device(0), Device(0), Device(1)])
    with pytest.raises(UserError, match='different numbers of devices .2, 1.; .*JAX_NUM_CPU'):
        run_folder.check_hosts(base.get_config('nano'))


def test_folders_that_are_not_shared_are_refused(second_of_two, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, 'SEEN_WITHIN', 0.1)
    second_of_two.append(True)
    with pytest.raises(UserError, match='Host 1 does not see .*; choose a folder that all hosts'):
        run_folder.check_shared(tmp_path)


def test_folders_that_are_seen_late_are_shared(second_of_two, tmp_path, monkeypatch):
    monkeypatch.setattr(time, 'sleep', lambda _: (tmp_path / 'config.json').touch())
    second_of_two.append(True)
    run_folder.check_shared(tmp_path)


@pytest.mark.parametrize('seen', [True, False])
def test_programs_are_kept_where_all_hosts_find_them(seen, second_of_two, tmp_path, monkeypatch):
    monkeypatch.setattr(startup, 'own_cache', True)
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path))
    enabled = jax.config.jax_enable_compilation_cache
    with tiny_runs.quick_compilation(tmp_path):
        jax.jit(lambda x: x * 3)(2.0)  # as hosts have spoken before
        before = {path.name for path in tmp_path.iterdir()}
        assert before
        (tmp_path / 'mark').touch()
        second_of_two.extend([{'result': 'mark'}, seen])
        try:
            hosts.share_programs_or_keep_none()
            (tmp_path / 'mark').unlink()
            jax.jit(lambda x: x * 5 + 1)(2.0)
            assert ({path.name for path in tmp_path.iterdir()} > before) == seen
            # Nor are they kept where this host does not find the mark.
            second_of_two.extend([{'result': 'mark'}, True])
            hosts.share_programs_or_keep_none()
            assert not jax.config.jax_enable_compilation_cache
        finally:
            jax.config.update('jax_enable_compilation_cache', enabled)


def test_each_host_keeps_its_replay_and_others_go(monkeypatch, tmp_path):
    def rings(index, count):
        monkeypatch.setattr(hosts, 'index', lambda: index)
        monkeypatch.setattr(hosts, 'count', lambda: count)
        monkeypatch.setattr(hosts, 'first', lambda function: index or function())
        folder = run_folder.own_rings(tmp_path / 'replay', on_disk=True)
        folder.mkdir(exist_ok=True, parents=True)
        (folder / 'image.ring').touch()
        return sorted(str(x.relative_to(tmp_path / 'replay')) for x in tmp_path.rglob('*.ring'))

    assert rings(0, 1) == ['image.ring']
    assert rings(0, 2) == ['0-of-2/image.ring']
    assert rings(1, 2) == rings(0, 2) == ['0-of-2/image.ring', '1-of-2/image.ring']
    assert rings(0, 12) == ['0-of-12/image.ring']
    assert rings(0, 1) == ['image.ring']
    assert run_folder.own_rings(tmp_path / 'replay', on_disk=False) is None
    assert not list(tmp_path.iterdir())


def test_meshes_of_many_hosts_take_all_devices():
    class Device:
        def __init__(self, process_index):
            self.process_index = process_index

    devices = [Device(number // 2) for number in range(4)]
    with pytest.raises(UserError, match='takes 2 devices of 4, but many hosts use all of theirs'):
        sharding.make_mesh(1, 2, devices)


@pytest.mark.parametrize(
    ('variables', 'expected'),
    [
        ({}, False),
        ({'SLURM_STEP_NODELIST': 'node[1-2]', 'SLURM_NTASKS': '2'}, True),
        ({'SLURM_STEP_NODELIST': 'node1', 'SLURM_NTASKS': '1'}, False),
        ({'SLURM_NTASKS': '8'}, False),  # in a batch script, outside of srun
        ({'KUBERNETES_SERVICE_HOST': '10.0.0.1', 'JOB_COMPLETION_INDEX': '1'}, True),
        ({'KUBERNETES_SERVICE_HOST': '10.0.0.1'}, False),  # a pod of its own
        ({'TPU_WORKER_HOSTNAMES': 'host-0,host-1'}, True),
        ({'TPU_PROCESS_ADDRESSES': 'local', 'TPU_WORKER_HOSTNAMES': 'localhost'}, False),
        ({'MEGASCALE_NUM_SLICES': '2'}, True),
    ],
)
def test_who_starts_processes_on_many_hosts(variables, expected, monkeypatch):
    for name in ('SLURM_STEP_NODELIST', 'KUBERNETES_SERVICE_HOST', 'TPU_WORKER_HOSTNAMES'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('TPU_SKIP_MDS_QUERY', '1')
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert hosts._started_together() == expected


def test_hosts_that_cannot_be_found(monkeypatch):
    def refuse(*arguments, **options):
        raise ValueError('no coordinator\nhere.')

    monkeypatch.setattr(jax.distributed, 'initialize', refuse)
    settings = base.get_config('nano').hosts
    hosts.connect(settings)  # this one alone
    settings.update(coordinator='10.0.0.1:1234', count=2)
    with pytest.raises(UserError, match='The other hosts cannot be found .no coordinator here.; '):
        hosts.connect(settings)
    settings.update(coordinator='', count=1)
    hosts.connect(settings)


def test_a_device_that_cannot_be_used_is_no_missing_host(monkeypatch):
    def refuse():
        raise RuntimeError("Unable to initialize backend 'cuda': INVALID_ARGUMENT: device 1")

    monkeypatch.delenv('JAX_PLATFORMS', raising=False)
    monkeypatch.setattr(hosts, '_started_together', lambda: True)
    monkeypatch.setattr(jax.distributed, 'initialize', lambda **_: None)
    monkeypatch.setattr(jax, 'process_count', refuse)
    with pytest.raises(UserError, match='A device cannot be used .* device 1.; .*--gpus-per-node'):
        hosts.connect(base.get_config('nano').hosts)


def test_devices_that_jax_takes_together_are_not_taken_apart(monkeypatch):
    """Hosts of a slice that are told to train by themselves would wait for each other for good."""
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    with pytest.raises(UserError, match='the devices of 2 hosts together here; leave out --config'):
        run_folder.check_hosts(base.get_config('nano'))


def test_a_port_that_is_taken_is_refused():
    """JAX would crash."""
    settings = base.get_config('nano').hosts
    with socket.create_server(('127.0.0.1', 0)) as server:
        settings.update(coordinator=f'127.0.0.1:{server.getsockname()[1]}', count=2)
        with pytest.raises(
            UserError, match='Something listens at the port of 127.0.0.1:.*; choose'
        ):
            hosts.connect(settings)


@pytest.mark.medium
def test_hosts_that_are_not_there(tmp_path):
    """JAX ends the process itself, with the trace of a stack."""
    script = 'import sys; from dreamerv3_jax import cli, hosts; hosts._PATIENCE = 0.5\n'
    script += 'sys.exit(cli.main(sys.argv[1:]))'
    names = [f'--config.hosts.coordinator=127.0.0.1:{free_port()}', '--config.hosts.count=2']
    result = subprocess.run(
        [sys.executable, '-c', script, 'train', '--config=quickstart', *names],
        cwd=tmp_path,
        env=os.environ | {'JAX_PLATFORMS': 'cpu'},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (2, '')
    assert result.stderr.startswith('dreamerv3-jax: The other hosts cannot be found (not all were')
    assert result.stderr.count('\n') == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('coordinator', 'bound'),
    [
        ('127.0.0.1:1234', True),
        ('localhost:1234', True),
        ('[::1]:1234', True),
        ('10.0.0.1:1234', False),
        ('localhost.example.org:1234', False),
    ],
)
def test_who_names_this_machine_is_not_heard_from_outside(coordinator, bound, monkeypatch):
    found = {}
    monkeypatch.setattr(jax.distributed, 'initialize', lambda *_, **options: found.update(options))
    settings = base.get_config('nano').hosts
    settings.update(coordinator=coordinator, count=2)
    hosts.connect(settings)
    assert found['coordinator_bind_address'] == (coordinator if bound else None)


@pytest.mark.parametrize('count', [1, 2])
def test_no_server_is_left_where_one_host_is_found(count, monkeypatch):
    calls = []
    monkeypatch.setattr(hosts, '_started_together', lambda: True)
    monkeypatch.setattr(jax, 'process_count', lambda: count)
    for name in ('initialize', 'shutdown'):
        monkeypatch.setattr(jax.distributed, name, lambda name=name, **_: calls.append(name))
    hosts.connect(base.get_config('nano').hosts)
    assert calls == ['initialize', 'shutdown'][: 3 - count]


def test_errors_of_one_host_end_it_at_once(monkeypatch, capsys):
    """The others learn of it as it is gone; what all raise together ends in the usual way."""
    codes, calls = [], []
    monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
    monkeypatch.setattr(jax.distributed, 'shutdown', lambda: calls.append('shutdown'))
    monkeypatch.setattr(os, '_exit', lambda code: codes.append(code))
    monkeypatch.setattr(hosts, '_LAST_WORDS', 0.0)

    def end(error):
        with pytest.raises(type(error)), hosts.together():
            raise error
        return codes.pop() if codes else None, capsys.readouterr().err

    assert end(UserError('The robot is gone.')) == (2, 'dreamerv3-jax: The robot is gone.\n')
    assert end(Failure('The robot fell.')) == (1, 'dreamerv3-jax: The robot fell.\n')
    assert end(KeyboardInterrupt()) == (130, '')
    assert end(SystemExit(143)) == (143, '')
    code, text = end(RuntimeError('UNKNOWN: Gloo AllReduce failed:\nConnection closed by peer.'))
    assert code == 1 and text.startswith('dreamerv3-jax: Another host is gone (UNKNOWN: Gloo All')
    code, text = end(ZeroDivisionError('a mistake of ours'))
    assert code == 1 and 'Traceback' in text
    calls.clear()
    assert end(hosts.agreed(UserError('The folder is in use.'))) == (None, '')
    assert calls == ['shutdown']


@pytest.mark.parametrize('together', [False, True])
def test_a_host_that_is_lost_during_a_checkpoint_is_no_failing_disk(
    together, tmp_path, monkeypatch
):
    checkpointer = checkpoint.Checkpointer(tmp_path)

    def lose(*_, **__):
        raise ValueError('UNKNOWN: Gloo AllGather failed: Connection closed by peer')

    monkeypatch.setattr(checkpointer._manager, 'save', lose)
    monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: together)
    with pytest.raises(ValueError if together else checkpoint.NotSaved, match='Gloo'):
        checkpointer.save(1, checkpoint.Saved({'x': np.zeros(1)}, None, {}))
