"""Checkpoints: exact round trips, which are kept, kills in the midst of saving, and errors while writing."""

import errno
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.tiny_checkpoints import META, make_state, names, save_one
from utils import checkpoints
from utils.checkpoints import CheckpointWriter, latest_step, load_meta, resolve, restore
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def assert_same_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert type(a) is type(b)
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """A checkpoint to look at."""
    return save_one(tmp_path_factory.mktemp('run') / 'checkpoints', make_state())


# --- Round trips ---


def test_every_dtype_comes_back_bit_for_bit(tmp_path):
    rng = np.random.default_rng(0)
    state = {
        'float32': jnp.asarray(rng.standard_normal((3, 5)), jnp.float32),
        'bfloat16': jnp.asarray(rng.standard_normal(7), jnp.bfloat16),
        'float16': jnp.asarray(rng.standard_normal(7), jnp.float16),
        'float8': jnp.asarray(rng.standard_normal(7), jnp.float8_e4m3fn),
        'uint32 key': jax.random.key_data(jax.random.key(3)),
        'uint8': jnp.arange(250, 260, dtype=jnp.uint8),
        'int32 scalar': jnp.int32(-5),
        'bool': jnp.array([True, False]),
        'complex64': jnp.array([1 + 2j], jnp.complex64),
        'nan payloads': np.array([0x7FC00001, 0xFFC12345, 0x80000000, 0x7F800000], np.uint32).view(np.float32),
        'int64 on the host': np.array(2**40 + 1),
        'float64 on the host': np.array([1 / 3]),
        'column-major': np.asfortranarray(rng.standard_normal((3, 4))),
        'sliced': np.arange(10)[::3],
        'empty': jnp.zeros((0, 3)),
        'nested': [({'deep': jnp.ones(2)},), None],
    }
    path = save_one(tmp_path, state)
    assert_same_bits(restore(path, state), state)


def test_a_state_comes_back_as_the_same_structure_from_shapes_alone(saved):
    state = make_state()
    assert_same_bits(restore(saved, make_state(scale=-3.0)), state)
    assert_same_bits(restore(saved, jax.eval_shape(make_state)), state)


def test_restored_arrays_can_be_donated_and_stay_on_their_sharding(saved):
    template = make_state()
    state = restore(saved, template)
    assert state.step.sharding == template.step.sharding
    before = jax.tree.map(np.array, state)  # copies: a view would keep jax from donating
    after = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(state)
    assert state.step.is_deleted()
    assert_same_bits(jax.device_get(jax.tree.map(lambda x: x - 1, after)), before)


def test_the_loop_may_overwrite_its_buffers_as_soon_as_save_returns(tmp_path):
    update = jax.jit(lambda x: x + 1, donate_argnums=0)
    device, host = jnp.zeros(200_000), np.zeros(200_000)
    address = device.unsafe_buffer_pointer()
    meta = META | {'partial_metrics': []}
    with CheckpointWriter(tmp_path) as writer:
        writer.save(1, {'device': device, 'host': host}, meta)
        for _ in range(5):
            device = update(device)
        host += 1
        meta['partial_metrics'].append(1)
        assert device.unsafe_buffer_pointer() == address  # the updates did write into the buffer that was saved
    stored = restore(tmp_path / '1', {'device': device, 'host': host})
    assert not np.any(stored['device']) and not np.any(stored['host'])
    assert load_meta(tmp_path)['partial_metrics'] == []


def test_saving_returns_before_the_checkpoint_is_written(tmp_path, monkeypatch):
    may_write = threading.Event()
    write = ocp.Checkpointer.save

    def wait_and_write(*args, **kwargs):
        assert may_write.wait(60)
        return write(*args, **kwargs)

    monkeypatch.setattr(ocp.Checkpointer, 'save', wait_and_write)
    with CheckpointWriter(tmp_path) as writer:
        writer.save(1, make_state(), META)
        assert latest_step(tmp_path) is None
        may_write.set()
        writer.wait()
        assert latest_step(tmp_path) == 1


def test_directories_may_be_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_one(Path('run/checkpoints'), {'x': jnp.arange(3)})
    np.testing.assert_array_equal(restore('run', {'x': jnp.zeros(3, jnp.int32)})['x'], [0, 1, 2])


def test_metadata_come_back(saved):
    assert load_meta(saved) == META | {'format_version': 1, 'step': 40, 'keep': False}


def test_orbax_itself_can_read_a_checkpoint(saved):
    with ocp.StandardCheckpointer() as checkpointer:
        arrays = checkpointer.restore(saved / 'state')
    np.testing.assert_array_equal(arrays['params.actor.kernel'], make_state().params['actor']['kernel'])


def test_orbax_is_silent(tmp_path, caplog):
    with caplog.at_level('DEBUG'):
        save_one(tmp_path, make_state())
    assert not [record for record in caplog.records if 'orbax' in record.pathname]


# --- What is kept and what is found ---


def test_the_latest_and_the_kept_checkpoints_stay(tmp_path):
    with CheckpointWriter(tmp_path) as writer:
        for step in (10, 20, 30, 100):
            writer.save(step, {'x': jnp.float32(step)}, META, keep=step == 20)
    assert names(tmp_path) == ['100', '20']
    with CheckpointWriter(tmp_path) as writer:  # a later process knows from the metadata which one to keep
        writer.save(110, {'x': jnp.float32(110)}, META)
    assert names(tmp_path) == ['110', '20']
    assert latest_step(tmp_path) == 110
    assert restore(tmp_path / '20', {'x': jnp.float32(0)})['x'] == 20


def test_what_a_killed_process_left_is_ignored_and_then_removed(tmp_path):
    directory = save_one(tmp_path, make_state()).parent
    for name in ('50.unfinished', '30.deleted'):
        (directory / name / 'state').mkdir(parents=True)
    (directory / 'notes').mkdir()
    assert latest_step(directory) == 40
    with CheckpointWriter(directory):
        pass
    assert names(directory) == ['40', 'notes']


def test_a_step_that_is_there_gets_new_metadata_and_is_never_given_up(tmp_path):
    with CheckpointWriter(tmp_path) as writer:
        writer.save(10, {'x': jnp.float32(1)}, META)
        writer.save(10, {'x': jnp.float32(1)}, META | {'metrics_lines': 9}, keep=True)
        writer.save(10, {'x': jnp.float32(1)}, META | {'metrics_lines': 9}, keep=False)
        writer.save(20, {'x': jnp.float32(2)}, META)
        with pytest.raises(ValueError, match='finetuning'):
            writer.save(20, {'x': jnp.float32(2)}, META | {'phase': 'finetuning'})
    assert names(tmp_path) == ['10', '20']
    assert load_meta(tmp_path / '10')['metrics_lines'] == 9
    assert restore(tmp_path / '10', {'x': jnp.float32(0)})['x'] == 1


def test_resolve_accepts_a_run_its_checkpoints_or_one_of_them(tmp_path):
    checkpoint_directory = tmp_path / 'run' / 'checkpoints'
    with CheckpointWriter(checkpoint_directory) as writer:
        writer.save(100, {'x': jnp.float32(1)}, META, keep=True)
        writer.save(180, {'x': jnp.float32(2)}, META | {'phase': 'finetuning'}, keep=True)
        writer.save(200, {'x': jnp.float32(3)}, META | {'phase': 'finetuning'})
    for path in (tmp_path / 'run', checkpoint_directory, checkpoint_directory / '200'):
        assert resolve(path) == checkpoint_directory / '200'
    assert resolve(tmp_path / 'run', phase='pretraining') == checkpoint_directory / '100'
    assert resolve(checkpoint_directory / '180', phase='pretraining') == checkpoint_directory / '180'
    with pytest.raises(UserError, match=r'no warming checkpoint .*finetuning at step 200.*pretraining at step 100'):
        resolve(tmp_path / 'run', phase='warming')


def test_a_run_may_be_called_by_a_number(tmp_path):
    save_one(tmp_path / '7' / 'checkpoints', {'x': jnp.float32(1)})
    assert resolve(tmp_path / '7') == tmp_path / '7' / 'checkpoints' / '40'


@pytest.mark.parametrize('made', [False, True])
def test_resolving_nothing_says_what_was_expected(tmp_path, made):
    path = tmp_path / 'run'
    if made:
        path.mkdir()
    assert latest_step(path) is None
    with pytest.raises(UserError, match=f'{path}.*expected a run directory or a checkpoint'):
        resolve(path)


def test_an_unknown_home_folder_is_a_user_error():
    with pytest.raises(UserError, match='the home folder ~no-such-user is not known'):
        resolve('~no-such-user/run')


# --- Kills ---


def test_the_latest_checkpoint_loads_whenever_a_process_is_killed(tmp_path):
    """kill -9 at different moments of a loop that does nothing but save."""
    program = textwrap.dedent("""
        import sys
        import numpy as np
        from pathlib import Path
        from utils.checkpoints import CheckpointWriter, latest_step
        directory = Path(sys.argv[1])
        step = latest_step(directory) or 0
        with CheckpointWriter(directory) as writer:
            while True:
                step += 1
                state = {f'leaf {i}': np.full((50, 50), step, np.float32) for i in range(20)}
                writer.save(step, state, {'phase': 'pretraining', 'metrics_lines': step}, keep=step % 50 == 0)
                print(step, flush=True)
    """)
    template = {f'leaf {i}': np.zeros((50, 50), np.float32) for i in range(20)}
    reached = 0
    for pause in (0.0, 0.02, 0.045):
        child = subprocess.Popen([sys.executable, '-c', program, tmp_path], stdout=subprocess.PIPE, cwd=ROOT, text=True)
        try:
            for _ in range(12):
                started = int(child.stdout.readline())
            time.sleep(pause)
        finally:
            child.send_signal(signal.SIGKILL)
            child.communicate()
        step = latest_step(tmp_path)
        assert step >= started - 1 > reached  # at most the save in progress is lost
        state = restore(tmp_path, template)
        assert all(np.all(leaf == step) for leaf in state.values())
        assert load_meta(tmp_path)['metrics_lines'] == step
        reached = step
    with CheckpointWriter(tmp_path) as writer:
        writer.save(reached + 1, template, META)
    assert names(tmp_path) == sorted({str(s) for s in range(50, reached + 1, 50)} | {str(reached + 1)})


# --- Errors while writing ---


def test_an_unwritable_directory_is_a_user_error(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match=f'cannot write {tmp_path}/file/checkpoints: Not a directory'):
        CheckpointWriter(tmp_path / 'file' / 'checkpoints')


def test_a_full_disk_is_told_by_the_next_call_and_leaves_nothing_half_written(tmp_path):
    """A limit on the size of files stands in for a full disk: writing fails inside the libraries in the same way."""
    small, large = {'x': jnp.zeros(10)}, {'x': jnp.zeros(300_000)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with CheckpointWriter(tmp_path) as writer:
        writer.save(10, small, META)
        writer.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
        try:
            writer.save(20, large, META)
            with pytest.raises(UserError, match=f'could not write checkpoint {tmp_path}/20') as caught:
                writer.save(30, small, META)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert '\n' not in str(caught.value)
        assert names(tmp_path) == ['10']
        writer.save(30, small, META)  # told once; there is room again
    assert names(tmp_path) == ['30']


def test_no_space_left_is_told_when_closing(tmp_path, monkeypatch):
    def no_space(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ocp.Checkpointer, 'save', no_space)
    writer = CheckpointWriter(tmp_path)
    writer.save(10, make_state(), META)
    with pytest.raises(UserError, match=r'No space left on device.*Make room'):
        writer.close()


def test_mistakes_of_the_caller_are_raised_at_once(tmp_path):
    with CheckpointWriter(tmp_path) as writer:
        with pytest.raises(TypeError):
            writer.save(1, make_state(), META | {'object': object()})
        with pytest.raises(ValueError):
            writer.save(1, make_state(), META | {'mean': float('nan')})
        with pytest.raises(TypeError, match='key_data'):
            writer.save(1, {'key': jax.random.key(0)}, META)
        with pytest.raises(ValueError, match='same dotted name'):
            writer.save(1, {'a': {'b': jnp.zeros(1)}, 'a.b': jnp.zeros(1)}, META)
    assert names(tmp_path) == []


def test_format_version_is_part_of_the_interface():
    assert checkpoints.FORMAT_VERSION == 1
