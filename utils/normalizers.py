"""The one observation normaliser of a run: fitted on the pre-training training set, stored in the checkpoint, applied
everywhere."""

import dataclasses

import numpy as np

from utils.errors import UserError

# Features with a variance below this are left unscaled: dividing by a rounding error would blow it up to unit size.
VARIANCE_FLOOR = 1e-8


@dataclasses.dataclass(frozen=True)
class Normalizer:
    """x ↦ (x − shift)/scale per feature; shift and scale are float32 (D,), or None for the identity (`none`, and
    images)."""

    kind: str
    shift: np.ndarray | None = None
    scale: np.ndarray | None = None

    @classmethod
    def fit(cls, observations: np.ndarray, kind: str) -> 'Normalizer':
        """Fits on observations (rows, D): `normal` → zero mean, unit variance; `bounded` → [−1, 1]; `none` → identity.

        Sums are accumulated in float64. Raises UserError for an unknown kind, and for anything but `none` on uint8
        images.
        """
        if kind not in ('none', 'normal', 'bounded'):
            raise UserError(f'obs_norm_type={kind!r}: expected none, normal or bounded')
        if kind == 'none':
            return cls(kind)
        if observations.dtype == np.uint8:
            raise UserError(
                f'obs_norm_type={kind!r} on images: expected none (the image encoder rescales pixels itself)'
            )
        if kind == 'normal':
            shift = observations.mean(axis=0, dtype=np.float64)
            variance = np.zeros_like(shift)
            for start in range(0, len(observations), 100_000):  # Streaming: no float64 copy of the data set.
                variance += ((observations[start : start + 100_000] - shift) ** 2).sum(axis=0)
            scale = np.sqrt(variance / len(observations))
        else:
            low, high = observations.min(axis=0).astype(np.float64), observations.max(axis=0).astype(np.float64)
            shift, scale = (low + high) / 2, (high - low) / 2
        scale = np.where(scale**2 < VARIANCE_FLOOR, 1.0, scale)
        return cls(kind, shift.astype(np.float32), scale.astype(np.float32))

    def __call__(self, observations):
        """Normalises observations (…, D); identity for kind `none`."""
        if self.shift is None:
            return observations
        return (observations - self.shift) / self.scale

    def inverse(self, observations):
        """Normalised observations (…, D) back in the simulator's units."""
        if self.shift is None:
            return observations
        return observations * self.scale + self.shift

    def to_dict(self) -> dict:
        """JSON-able; float32 values survive the round trip exactly."""
        return {
            'kind': self.kind,
            'shift': None if self.shift is None else self.shift.tolist(),
            'scale': None if self.scale is None else self.scale.tolist(),
        }

    @classmethod
    def from_dict(cls, values: dict) -> 'Normalizer':
        arrays = {k: None if values[k] is None else np.asarray(values[k], np.float32) for k in ('shift', 'scale')}
        return cls(values['kind'], **arrays)
