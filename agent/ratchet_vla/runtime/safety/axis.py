"""One axis under limits of velocity, acceleration, jerk and position: the next velocity, one that can be stopped.

Knows numbers in seconds and one unit. Knows no robot, no action space and no reason for stopping.
Every accepted state is viable: from it the axis can brake within acceleration and jerk without leaving its position
range, so no later step has to break one limit to keep another. For acceleration alone the test is closed form; with
jerk the braking is simulated, step by step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

INF = math.inf
TOUCH = 1e-6  # relative: what exceeds a limit by less than this is rounding of float32, and passes as it is
BRAKING_STEPS = 400
BISECTIONS = 12
FINE = 4.0  # braking is foreseen in steps of a period and in steps of this fraction of it


@dataclass
class Motion:
    """Velocity and acceleration of one axis after the last command, per second and per second squared."""

    v: float = 0.0
    a: float = 0.0


@dataclass(frozen=True)
class Cut:
    """Why a wish was cut. kind: velocity, acceleration, jerk or position; value: asked; limit: allowed (same unit)."""

    kind: str
    value: float
    limit: float


@dataclass(frozen=True)
class Axis:
    """Limits of one axis. slow, fast: lowest and highest velocity; low, high: position range; inf for none.

    period: seconds between commands, the step in which braking is foreseen.
    """

    slow: float
    fast: float
    acceleration: float
    jerk: float = INF
    low: float = -INF
    high: float = INF
    period: float = 0.05

    @property
    def stop_time(self) -> float:
        """Seconds from the highest velocity to standstill, at the most."""
        v = max(self.fast, -self.slow)
        if math.isinf(v):
            return INF if math.isfinite(self.acceleration) or math.isfinite(self.jerk) else 0.0
        ramp = 0.0 if math.isinf(self.jerk) else math.sqrt(v / self.jerk)
        if math.isinf(self.acceleration) or ramp * self.jerk <= self.acceleration:
            return 2.0 * ramp
        return v / self.acceleration + (0.0 if math.isinf(self.jerk) else self.acceleration / self.jerk)

    def next(
        self, wish: float, position: float, now: Motion, dt: float, share: float = 1.0
    ) -> tuple[float, float, Cut | None]:
        """The next velocity and acceleration, and the limit that cut the wish most, if any.

        wish: velocity wanted for the coming `dt` seconds (> 0); finite or infinite, never NaN.
        position: where the axis is; NaN where unknown, and then no position limit holds.
        share: of the velocity range that is open at this moment, in [0, 1]: a ramp.
        """
        if math.isfinite(self.jerk):
            return self._with_jerk(wish, position, now, dt, share)
        slow, fast = self.slow * share if share < 1.0 else self.slow, self.fast * share if share < 1.0 else self.fast
        cut: Cut | None = None
        v = wish
        if v > fast + TOUCH * abs(fast):
            v, cut = fast, Cut("velocity", wish, fast)
        elif v < slow - TOUCH * abs(slow):
            v, cut = slow, Cut("velocity", wish, slow)
        step = self.acceleration * dt
        most, least = now.v + step, now.v - step
        if v > most + TOUCH * step:
            v, cut = most, Cut("acceleration", (v - now.v) / dt, self.acceleration)
        elif v < least - TOUCH * step:
            v, cut = least, Cut("acceleration", (v - now.v) / dt, -self.acceleration)
        if v > 0.0 and not math.isinf(self.high):
            bound = self._approach(self.high - position, dt)
            if v > bound + TOUCH * abs(v):
                cut = Cut("position", position + v * dt, self.high)
                v = max(bound, least)
        elif v < 0.0 and not math.isinf(self.low):
            bound = -self._approach(position - self.low, dt)
            if v < bound - TOUCH * abs(v):
                cut = Cut("position", position + v * dt, self.low)
                v = min(bound, most)
        return v, (v - now.v) / dt, cut

    def brake(self, now: Motion, dt: float) -> tuple[float, float]:
        """The next velocity and acceleration on the way to standstill, as quick as the limits allow."""
        if math.isinf(self.jerk):
            step = self.acceleration * dt
            v = now.v - step if now.v > step else now.v + step if now.v < -step else 0.0
            return v, (v - now.v) / dt
        return self._brake(now.v, now.a, dt)

    # -- without jerk --------------------------------------------------------------------------------------------

    def _approach(self, room: float, dt: float) -> float:
        """Largest v with v dt + v^2 / (2 A) <= room: one step, then braking, ends inside. NaN room is no bound."""
        if math.isnan(room):
            return INF
        if room <= 0.0:
            return 0.0
        if math.isinf(self.acceleration):
            return room / dt
        return self.acceleration * (math.sqrt(dt * dt + 2.0 * room / self.acceleration) - dt)

    # -- with jerk -----------------------------------------------------------------------------------------------

    def _with_jerk(
        self, wish: float, position: float, now: Motion, dt: float, share: float
    ) -> tuple[float, float, Cut | None]:
        slow, fast = self.slow * share if share < 1.0 else self.slow, self.fast * share if share < 1.0 else self.fast
        cut: Cut | None = None
        v = wish
        if v > fast + TOUCH * abs(fast):
            v, cut = fast, Cut("velocity", wish, fast)
        elif v < slow - TOUCH * abs(slow):
            v, cut = slow, Cut("velocity", wish, slow)
        a = (v - now.v) / dt
        change = self.jerk * dt
        low, high = max(now.a - change, -self.acceleration), min(now.a + change, self.acceleration)
        # Velocity must stay in range while the acceleration is taken back to zero: v + a dt + a^2 / (2 J) <= fast.
        high = max(min(high, self._ease(fast - now.v, dt)), low)
        low = min(max(low, -self._ease(now.v - slow, dt)), high)
        if not low - TOUCH * change <= a <= high + TOUCH * change:
            wanted = max(-self._ease(now.v - v, dt), min(a, self._ease(v - now.v, dt)))
            kind = "jerk" if abs(a) <= self.acceleration else "acceleration"
            cut = Cut(kind, a, min(max(a, low), high)) if cut is None else cut
            a = min(max(wanted, low), high)
            v = now.v + a * dt
        if not math.isnan(position) and not self._viable(position, dt, v, a):
            cut = Cut("position", position + v * dt, self.high if v > 0 or (v == 0 and a > 0) else self.low)
            v, a = self._least_change(position, v, a, now, dt)
        return v, a, cut

    def _ease(self, room: float, dt: float) -> float:
        """Largest a >= 0 with a dt + a^2 / (2 J) <= room."""
        if room <= 0.0:
            return 0.0
        if math.isinf(room):
            return INF
        return self.jerk * (math.sqrt(dt * dt + 2.0 * room / self.jerk) - dt)

    def _brake(self, v: float, a: float, dt: float) -> tuple[float, float]:
        change = self.jerk * dt
        rest = -v / dt
        if abs(rest - a) <= change and abs(rest) <= min(change, self.acceleration):
            return 0.0, rest
        if v < 0.0:
            mirrored_v, mirrored_a = self._brake(-v, -a, dt)
            return -mirrored_v, -mirrored_a
        a = min(max(a - change, -self.acceleration, -self._ease(v, dt)), a + change)
        return v + a * dt, a

    def _viable(self, here: float, dt: float, v: float, a: float) -> bool:
        """Whether one step at v, then braking, ends inside. Outside already: whether it moves no further out."""
        p = here + v * dt
        peak = abs(v) + a * a / (2.0 * self.jerk)
        hard = 0.0 if math.isinf(self.acceleration) else peak / self.acceleration
        far = peak * (abs(a) / self.jerk + hard + min(self.acceleration / self.jerk, math.sqrt(peak / self.jerk)) * 2.0)
        far += 3.0 * peak * self.period
        if p + far <= self.high and p - far >= self.low:
            return True
        # The coming steps may be as long as a period or much shorter (a burst): braking must end inside either way.
        return self._brakes(here, p, v, a, self.period) and self._brakes(here, p, v, a, self.period / FINE)

    def _brakes(self, here: float, p: float, v: float, a: float, step: float) -> bool:
        low, high = min(self.low, here) - TOUCH, max(self.high, here) + TOUCH
        for _ in range(BRAKING_STEPS):
            if not low <= p <= high:
                return False
            if v == 0.0 and abs(a) <= self.jerk * step:
                return True
            before = v
            v, a = self._brake(v, a, step)
            p += (max(v, before) if v > 0.0 else min(v, before)) * step  # an upper bound on what the step covers
        return True

    def _least_change(self, position: float, v: float, a: float, now: Motion, dt: float) -> tuple[float, float]:
        """Between full braking, which was viable before, and the wish: the nearest to the wish that is viable."""
        braking = self._brake(now.v, now.a, dt)
        good, bad = braking[1], a
        if not self._viable(position, dt, *braking):
            return braking
        for _ in range(BISECTIONS):
            middle = 0.5 * (good + bad)
            speed = now.v + middle * dt
            if self._viable(position, dt, speed, middle):
                good = middle
            else:
                bad = middle
        return now.v + good * dt, good
