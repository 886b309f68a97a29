"""Checkpoints that cannot be read: damage of every kind is named, and so is what does not fit."""

import json
import os
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny_checkpoints import META, make_state, names, save_one
from utils.checkpoints import CheckpointWriter, latest_step, load_meta, restore
from utils.errors import UserError


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """The checkpoint that tests copy to damage it."""
    return save_one(tmp_path_factory.mktemp('run') / 'checkpoints', make_state())


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / 'checkpoints' / saved.name)


# --- Damage ---


def values_file(checkpoint):
    """The file that holds most of the values."""
    return max((checkpoint / 'state').rglob('d/*'), key=lambda path: path.stat().st_size)


def truncate(checkpoint):
    os.truncate(values_file(checkpoint), values_file(checkpoint).stat().st_size // 2)


def flip_a_bit_of_a_value(checkpoint):
    """The smallest damage there is, where the storage format itself has no checksum."""
    kernel = np.arange(1200, dtype=np.float32).tobytes()
    # Which of its files gets which array is the storage's business, and differs from save to save.
    (file,) = (file for file in (checkpoint / 'state').rglob('d/*') if kernel in file.read_bytes())
    content = bytearray(file.read_bytes())
    content[content.index(kernel) + 4] ^= 1
    file.write_bytes(content)


def remove_values(checkpoint):
    values_file(checkpoint).unlink()


def garble_manifest(checkpoint):
    file = checkpoint / 'state' / 'manifest.ocdbt'
    file.write_bytes(bytes(file.stat().st_size))


def remove_state(checkpoint):
    shutil.rmtree(checkpoint / 'state')


def remove_index(checkpoint):
    (checkpoint / 'index.json').unlink()


def empty_index(checkpoint):
    (checkpoint / 'index.json').write_text('{}')


def remove_meta(checkpoint):
    (checkpoint / 'meta.json').unlink()


def cut_meta(checkpoint):
    os.truncate(checkpoint / 'meta.json', 20)


def empty_meta(checkpoint):
    os.truncate(checkpoint / 'meta.json', 0)


def listed_meta(checkpoint):
    (checkpoint / 'meta.json').write_text('[]')


def bare_meta(checkpoint):
    (checkpoint / 'meta.json').write_text('{"format_version": 1}')


def mistyped_meta(checkpoint):
    file = checkpoint / 'meta.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | {'phase': 7}))


def listed_index(checkpoint):
    (checkpoint / 'index.json').write_text('{"leaves": [], "files": {}}')


def unversioned_meta(checkpoint):
    (checkpoint / 'meta.json').write_text('{}')


@pytest.mark.parametrize(
    'damage',
    [
        truncate,
        flip_a_bit_of_a_value,
        remove_values,
        garble_manifest,
        remove_state,
        remove_index,
        empty_index,
        remove_meta,
        cut_meta,
        empty_meta,
        listed_meta,
        unversioned_meta,
        bare_meta,
        mistyped_meta,
        listed_index,
    ],
)
def test_a_damaged_checkpoint_is_named(copy, damage):
    damage(copy)
    assert latest_step(copy.parent) == 40  # not passed over in silence
    with pytest.raises(UserError, match=f'{copy} is damaged') as caught:
        restore(copy, make_state())
    assert '\n' not in str(caught.value)


def test_a_newer_format_is_refused(copy):
    file = copy / 'meta.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | {'format_version': 2}))
    for read in (load_meta, lambda path: restore(path, make_state())):
        with pytest.raises(UserError, match=f'{copy} has format version 2.*reads up to 1.*Update'):
            read(copy)


def test_a_damaged_older_checkpoint_is_not_deleted(copy):
    cut_meta(copy)
    with CheckpointWriter(copy.parent) as writer:
        writer.save(50, make_state(), META)
    assert names(copy.parent) == ['40', '50']


# --- Misfits ---


def with_kernel(kernel):
    state = make_state()
    return state.replace(params={'actor': {**state.params['actor'], 'kernel': kernel}})


@pytest.mark.parametrize(
    ('template', 'message'),
    [
        (with_kernel(jnp.zeros((30, 5))), r'params\.actor\.kernel is float32\[30, 40\] .*float32\[30, 5\] is expected'),
        (
            with_kernel(jnp.zeros((30, 40), jnp.bfloat16)),
            r'params\.actor\.kernel is float32\[30, 40\] .*bfloat16\[30, 40\]',
        ),
        (with_kernel({'a': jnp.zeros(1)}), r'it has no params\.actor\.kernel\.a'),
        (make_state().replace(params={}), r'params\.actor\.bias is not in use'),
    ],
)
def test_a_misfit_names_the_leaf_and_both_shapes(saved, template, message):
    with pytest.raises(UserError, match=f'{saved} does not fit.*{message}'):
        restore(saved, template)
