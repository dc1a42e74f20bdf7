"""A trial's run on one rank: pre-training that is probed where a part of it ends, by all ranks together.

The probe reads the student as it is, on the training's own devices: at a rung a trial has nothing else to do.
"""

from __future__ import annotations

import copy

from amd.config import ScalingConfig
from amd.downstream.probing.run import probe_now
from amd.training.process_group import Team
from amd.training.run_folder import RunSpec
from amd.training.runs.kinds import PRETRAINING
from amd.training.trainer.loop import Edge, Outcome
from amd.training.trainer.pretraining import Pretraining


def work(spec: RunSpec, team: Team, edge: Edge) -> Outcome:
    """Train to `spec.until` or to the end, then probe. As `amd.training.trainer.pretraining.work` otherwise."""
    return Probed(spec, team, edge).run()


class Probed(Pretraining):
    def wants_checkpoint(self, done: int) -> bool:
        return False

    def evaluate(self, done: int) -> dict[str, float]:
        config = self.config
        assert config.probe is not None, "a sweep's trials are probed"
        if done != self.last:
            return {}
        scaling = ScalingConfig(device=self.learner.device.type, precision=self.learner.precision)
        encoder = copy.deepcopy(self.learner.student.encoder)
        return probe_now(config.probe, encoder, config.clip, config.data.interpolation, self.team, scaling)


TRIAL = PRETRAINING._replace(work=work, probed_on_the_way=False)
