"""Which coils are dead: silent, far too weak, or with noise where the others have signal; from when on."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from recon.arrays import Array

# Peak power over the coil's own noise. A line is strong where a quarter of the coils pass STRONG: the centre of k-space in
# every real scan with several coils (7 scans, 2 to 16 coils): their weakest coil reaches 6700 there. The largest of 10³
# draws of noise is 14 times its mean, and its level is underestimated by half from the ends of readouts. The coil of a
# simulated scan that sees least of the head reaches 17 in three lines in a row.
STRONG = 1000.0
NOISE_ONLY = 12.0
UNDERESTIMATED = 2.0  # times, where no noise was measured
N_STRONG = 4  # strong lines in a row without signal in a coil
# Of the median coil's energy. Real scans: 0.41 and more; receivers' gains differ by a factor of a few, not of 100.
WEAK = 1e-4
# A coil that fails off the centre of k-space, where lines are hardly above noise: the excess of power in the middle of
# the readout over its ends, in the last lines together, is no more than noise gives, where the upper coils' excess
# would make it far more. In standard deviations of that excess; anatomy moves shares by a factor of 3.
NO_SIGNAL = 4.0
EXPECTED = 200.0
N_RECENT = 8  # lines
_MIDDLE = 4  # the middle fourth of a readout
_UPPER = 3  # of four: the coil that stands for those that work, as half of them may be dead
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
        self._last_ends: Array | None = None  # and of the last one
        self._n_ends = 1
        self._n_noise = 0
        self._energy: Array = 0.0
        self._n_lines = 0
        self._silent: list[int] = []  # strong lines in a row in which each coil held nothing, and the first of them
        self._since: list[int] = []
        self._was_alive: list[bool] = []
        self._dead: set[int] = set()
        self._excess: list[Array] = []  # of the middle over the ends, by coil, of the last lines
        self._before: Array = 0.0  # the sum of those before
        self._recent: list[int] = []

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
        faults += self._faded(power, order)
        floor = quietest if self.noise is None else self.noise
        most = NOISE_ONLY * (UNDERESTIMATED if self.noise is None else 1.0)
        ratios = (peak / np.maximum(floor, np.finfo(np.float32).tiny)).tolist()
        if sorted(ratios)[_UPPER * n_coils // 4] < STRONG:
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

    def _faded(self, power: Array, order: int) -> list[CoilFault]:
        """Coils whose signal is gone from the last lines, by what the others have there."""
        assert self._last_ends is not None
        n = power.shape[1]
        width = max(2, n // _MIDDLE)
        middle = power[:, (n - width) // 2 : (n + width) // 2]
        self._excess.append(middle.sum(axis=1) - self._last_ends * np.float32(width))
        self._recent.append(order)
        if len(self._excess) <= N_RECENT:
            return []
        self._before = self._before + self._excess.pop(0)
        self._recent.pop(0)
        recent = np.sum(self._excess, axis=0)
        typical = float(np.quantile(self._before, _UPPER / 4))
        if typical <= 0:
            return []
        expected = self._before / typical * float(np.quantile(recent, _UPPER / 4))
        noise = self._floor if self.noise is None else self.noise
        # A sum of n squares of a normal deviate varies by the root of 2 n; the ends add as much again.
        spread = np.asarray(noise) * np.sqrt(2 * N_RECENT * width * (1 + width / self._n_ends))
        gone = (recent < NO_SIGNAL * spread) & (expected > EXPECTED * spread)
        out = []
        for coil in np.flatnonzero(gone):
            if int(coil) not in self._dead:
                value, usual = float(recent[coil] / spread[coil]), float(expected[coil] / spread[coil])
                words = (
                    f"holds noise only ({value:.1f} standard deviations of signal, {usual:.0f} by what the others hold; "
                    f"{NO_SIGNAL:g} is the least)"
                )
                out.append(self._found(int(coil), self._recent[0], value, NO_SIGNAL, words, False))
        return out

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

    def _ends(self, power: Array) -> Array:
        n = 2 * max(1, power.shape[1] // (2 * _ENDS))
        ends = (power[:, :n].sum(axis=1) + power[:, -n:].sum(axis=1)) / np.float32(2 * n)
        self._last_ends, self._n_ends = ends, 2 * n
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
