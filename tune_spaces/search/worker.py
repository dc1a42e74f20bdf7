"""One rank of a trial's run: pre-training, followed by a probe on all ranks at each rung.

The probe evaluates the current student on the training devices, which are idle at that point.
"""

from __future__ import annotations

import copy

from amd.config import ScalingConfig
from amd.downstream.probing.run import probe_now
from amd.training.process_group import ProcessGroup
from amd.training.run_folder import RunSpec
from amd.training.runs.kinds import PRETRAINING
from amd.training.trainer.pretraining import Pretraining
from amd.training.trainer.run_hooks import LoopResult, RunHooks


def work(spec: RunSpec, group: ProcessGroup, hooks: RunHooks) -> LoopResult:
    """Train to `spec.until` or to the end, then probe; otherwise the same as `pretraining.work`."""
    return ProbedPretraining(spec, group, hooks).run()


class ProbedPretraining(Pretraining):
    """Pre-training that is probed at its last step instead of at checkpoints."""

    def is_checkpoint_due(self, done: int) -> bool:
        return False

    def evaluate(self, done: int) -> dict[str, float]:
        config = self.config
        assert config.probe is not None, "every trial of a sweep is probed"
        if done != self.last:
            return {}
        scaling = ScalingConfig(device=self.learner.device.type, precision=self.learner.precision)
        encoder = copy.deepcopy(self.learner.student.encoder)
        return probe_now(config.probe, encoder, config.clip, config.data.interpolation, self.group, scaling)


TRIAL = PRETRAINING._replace(work=work, supports_probe=False)
