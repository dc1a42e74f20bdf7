"""A supervised run on one rank: the training loop, periodic validation and the final test."""

from __future__ import annotations

from typing import Any

from amd.data.loading.clip_dataset import Records
from amd.data.loading.loader import ClipLoader
from amd.downstream.supervised.evaluation import EvaluationContext, EvaluationData, EvaluationScores
from amd.downstream.supervised.learner import SupervisedLearner, load_start
from amd.downstream.supervised.report import TEST, damaged_warning, selection_warning, unreadable_warning, write_result
from amd.downstream.supervised.task import SupervisedTask
from amd.flops import encoder_flops
from amd.storage import join
from amd.training.process_group import ProcessGroup
from amd.training.run_folder import RunSpec
from amd.training.trainer.loop import Training
from amd.training.trainer.open_data import open_on_main
from amd.training.trainer.run_hooks import LoopResult, RunHooks


def work_on(task: type[SupervisedTask], spec: RunSpec, group: ProcessGroup, hooks: RunHooks) -> LoopResult:
    """Train a task on one rank; implements `work` for supervised run kinds."""
    config = spec.parsed(task.config_type)
    opened = open_on_main(group, config.data, spec.folder, lambda _: task(config))
    return SupervisedTraining(opened, spec, group, hooks).run()


class SupervisedTraining(Training):
    learner: SupervisedLearner[Any]

    def __init__(self, task: SupervisedTask, spec: RunSpec, group: ProcessGroup, hooks: RunHooks) -> None:
        self.task, self.config = task, task.config
        super().__init__(spec, task.config, group, hooks)
        self.learner = task.new_learner(
            group, lambda network: load_start(network.encoder, task.config, final_norm=task.final_norm)
        )
        self.on = EvaluationContext(group, self.learner.precision, self.stop_requested)

    def open_manifest(self) -> Records:
        return self.task.train

    def open_loader(self, **more: Any) -> ClipLoader:
        return super().open_loader(**self.task.loader_options(), **more)

    def flops_per_clip(self) -> float:
        """Return three times the forward FLOPs (twice for the patch embedding, because pixels need no gradient)."""
        clip = self.config.clip
        embedding, blocks = encoder_flops(self.config.encoder, clip.grid.tokens, clip.token_values)
        return 2 * embedding + 3 * blocks

    def evaluate(self, done: int) -> dict[str, float]:
        every = self.config.evaluation.every_epochs * self.loader.steps_per_epoch
        data = self.task.validation
        if data is None or (done % every and done != self.steps):
            return {}
        scored = self.task.score(self.learner.tested, data, self.on)
        self._warn_of_unreadable(scored, data)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in scored.figures.items())
        self.emit("note", text=f"step {done}: {shown}")
        return scored.figures

    def finalize(self, done: int) -> dict[str, float]:
        """Test the best or last checkpoint and write reports to the run folder."""
        data, group = self.task.test, self.group
        if data is None:
            return {}
        found = self.task.load_tested(self.store, done) if group.is_main else None
        tested = group.broadcast_from_main(lambda: found[0] if found else 0)
        network = self.task.restore((found[1] if found else self.store.load(tested)).tensors)
        self.emit("note", text=f"testing step {tested}{self.task.test_note(data)}")
        if self.task.selected_on_test:
            self.emit("warning", text=selection_warning(data))
        folder = join(self.spec.folder, TEST)
        scored = self.task.score_test(network.to(group.device), data, self.on, folder)
        self._warn_of_unreadable(scored, data)
        if scored.faults.damaged:
            self.emit("warning", text=damaged_warning(data, scored.faults.damaged))
        if group.is_main:
            settings = self.task.write_reports(folder, scored, data)
            settings["checkpoint"] = self.config.evaluation.checkpoint
            settings["selected_on_test"] = self.task.selected_on_test
            write_result(folder, data, scored, tested, **settings)
        return {name.replace("eval/", "test/"): value for name, value in scored.figures.items()}

    def _warn_of_unreadable(self, scored: EvaluationScores, data: EvaluationData) -> None:
        if scored.faults.bad:
            text = unreadable_warning(data, scored.faults.bad, self.task.unit, self.task.unreadable_as)
            self.emit("warning", text=text)
