"""Which coils are dead: silent, far too weak, or with noise where the others have signal; from when on."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from recon.arrays import Array

# Peak power over the coil's own noise. A line is strong where half of the coils pass STRONG: the centre of k-space
# in every real scan with several coils (7 scans, 2 to 16 coils): their weakest coil reaches 6700 there. The largest of
# 10³ draws of noise is 7 to 14 times its mean, and its level is underestimated by half from the ends of readouts. The
# coil of a simulated scan that sees least of the head reaches 13 to 17 in a few lines in a row.
STRONG = 1000.0
NOISE_ONLY = 12.0
UNDERESTIMATED = 2.0  # times, where no noise was measured
N_STRONG = 4  # strong lines in a row without signal in a coil
# Of the median coil's energy. Real scans: 0.41 and more; receivers' gains differ by a factor of a few, not of 100.
WEAK = 1e-4
_ENDS = 16  # the noise is looked for in the first and the last 16th of a readout, as in recon.noise


class CoilFault(NamedTuple):
    """A dead coil. order: the readout from which on. value, threshold: measured, and what would have passed.
    from_start: it never worked."""

    coil: int
    order: int
    value: float
    threshold: float
    words: str
    from_start: bool


class CoilWatch:
    """Follows the power in each coil. All powers are of real or imaginary parts, float32 (coil, 2 · sample)."""

    def __init__(self) -> None:
        self.noise: Array | None = None  # mean power by coil of the noise readouts
        self._floor: Array | None = None  # the least power at the ends of any line
        self._n_noise = 0
        self._energy: Array = 0.0
        self._n_lines = 0
        self._silent: list[int] = []  # strong lines in a row in which each coil held nothing, and the first of them
        self._since: list[int] = []
        self._was_alive: list[bool] = []
        self._dead: set[int] = set()

    @property
    def quietest(self) -> Array | None:
        """The least power at the ends of any imaging line, float32 (coil,)."""
        return self._floor

    def add_noise(self, energy: Array, n: int) -> None:
        """Take a noise readout's energy, float32 (coil,), of `n` real and imaginary parts."""
        total = self._n_noise + n
        before = 0.0 if self.noise is None else self.noise * (self._n_noise / total)
        self.noise, self._n_noise = before + energy / np.float32(total), total

    def add(self, power: Array, energy: Array, peak: Array, order: int) -> list[CoilFault]:
        """Take an imaging line: power, float32 (coil, 2 · kx), its sum and maximum by coil; return dead coils."""
        n_coils = len(energy)
        if n_coils == 1:  # nothing to compare with; a receiver that stops shows as a jump of gain
            self._ends(power)
            return []
        if not self._silent:
            self._silent, self._since, self._was_alive = [0] * n_coils, [0] * n_coils, [False] * n_coils
        self._energy = self._energy + energy
        self._n_lines += 1
        faults = self._zero(energy, order) if float(energy.min()) == 0.0 else []
        quietest = self._ends(power)
        floor = quietest if self.noise is None else self.noise
        most = NOISE_ONLY * (UNDERESTIMATED if self.noise is None else 1.0)
        ratios = (peak / np.maximum(floor, np.finfo(np.float32).tiny)).tolist()
        if sorted(ratios)[n_coils // 2] < STRONG:
            return faults
        for coil, ratio in enumerate(ratios):
            if ratio >= most:
                self._silent[coil], self._was_alive[coil] = 0, True
                continue
            if not self._silent[coil]:
                self._since[coil] = order
            self._silent[coil] += 1
            if self._silent[coil] == N_STRONG and coil not in self._dead:
                words = (
                    f"holds noise only ({ratio:.0f} times its level at most, where others hold {STRONG:.0f} and more)"
                )
                faults.append(self._found(coil, self._since[coil], ratio, most, words))
        return faults

    def weak(self, order: int) -> list[CoilFault]:
        """Return coils whose energy so far is far below that of the others, once an image is complete."""
        if self._n_lines == 0:
            return []
        median = float(np.median(self._energy))
        out = []
        for coil in np.flatnonzero(self._energy < WEAK * median):
            if int(coil) not in self._dead:
                share = float(self._energy[coil]) / median
                words = f"holds {share:.1g} of the median coil's energy; {WEAK:g} is the least"
                out.append(self._found(int(coil), order, share, WEAK, words, True))
        return out

    def is_new(self, coil: int) -> bool:
        """Whether `coil` was not known to be dead; it is now."""
        is_new = coil not in self._dead
        self._dead.add(coil)
        return is_new

    def _ends(self, power: Array) -> Array:
        n = 2 * max(1, power.shape[1] // (2 * _ENDS))
        ends = (power[:, :n].sum(axis=1) + power[:, -n:].sum(axis=1)) / np.float32(2 * n)
        # Zeros were put there by whoever sent them: they are no noise.
        ends = np.where(ends > 0, ends, np.float32(np.inf))
        self._floor = ends if self._floor is None else np.minimum(self._floor, ends)
        return self._floor

    def _zero(self, energy: Array, order: int) -> list[CoilFault]:
        if not energy.any():
            return []  # a line without any signal says nothing of one coil
        coils = [int(coil) for coil in np.flatnonzero(energy == 0) if int(coil) not in self._dead]
        return [self._found(c, order, 0.0, 0.0, "gives nothing but zeros", self._n_lines == 1) for c in coils]

    def _found(
        self, coil: int, order: int, value: float, threshold: float, words: str, from_start: bool | None = None
    ) -> CoilFault:
        self._dead.add(coil)
        never = not self._was_alive[coil] if from_start is None else from_start
        when = "from the start" if never else f"from readout {order} on"
        return CoilFault(coil, order, value, threshold, f"coil {coil} {words}, {when}", never)
