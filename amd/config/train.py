"""Config for a pre-training run, and its cross-section validation."""

from __future__ import annotations

from pydantic import Field

from amd.config.locations import WeightsLocation
from amd.config.probe import RunProbeConfig
from amd.config.run import RunConfig
from amd.config.sections import ONLY_AMD, POSITION_PARTS, MaskConfig, ObjectiveConfig, StudentConfig, TeacherConfig
from amd.config.training_sections import MediaConfig


class TrainConfig(RunConfig):
    """Complete config for a pre-training run."""

    student: StudentConfig = StudentConfig()
    """Student: the encoder, decoder and generators that are trained."""
    teacher: TeacherConfig | None = Field(None, json_schema_extra=ONLY_AMD)
    """Frozen teacher; required with objective.kind=amd, not allowed with mae."""
    mask: MaskConfig = MaskConfig()
    """Asymmetric masking."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """Training objective."""
    start: WeightsLocation | None = None
    """Checkpoint to start from, written by another run under the storage root. It supplies the weights, optimizer state
    and step; everything else, including the schedule, comes from this config. Default: start from scratch."""
    probe: RunProbeConfig | None = None
    """Probes that evaluate the encoder on labelled data during training, in a separate process. Default: no probes."""
    media: MediaConfig = MediaConfig()
    """Pictures of fixed training samples, written during training."""

    def _problems(self) -> list[str]:
        return [*self._teacher_problems(), *self._mask_problems(), *super()._problems()]

    def _teacher_problems(self) -> list[str]:
        objective, teacher = self.objective, self.teacher
        if objective.kind == "mae":
            if teacher is not None:
                return ["teacher: objective.kind=mae does not use a teacher; set teacher=null or objective.kind=amd"]
            return (
                []
                if objective.weights.reconstruction
                else ["objective.weights.reconstruction=0 leaves no loss with objective.kind=mae; raise it above 0"]
            )
        if teacher is None:
            return ["teacher: objective.kind=amd requires a teacher; set teacher.weights or teacher.preset"]
        problems = []
        if not objective.layers:
            problems.append("objective.layers: objective.kind=amd needs at least one layer pair; add one")
        students = [pair.student for pair in objective.layers]
        if len(set(students)) < len(students):
            problems.append(
                f"objective.layers: student blocks {students} repeat; each aligned block has a single projection"
            )
        for i, pair in enumerate(objective.layers):
            for role, block, depth in (
                ("student", pair.student, self.student.encoder.depth),
                ("teacher", pair.teacher, teacher.encoder.depth),
            ):
                if block > depth:
                    where = "student.encoder.depth" if role == "student" else "teacher.encoder.depth"
                    problems.append(
                        f"objective.layers.{i}.{role}={block} is out of range: blocks are numbered 1 to {where}={depth}"
                    )
        if not objective.weights.reconstruction and self.student.encoder.depth not in students:
            problems.append(
                "objective.weights.reconstruction=0 leaves the student's blocks after the last aligned one untrained; "
                f"align block {self.student.encoder.depth} too, or keep reconstruction"
            )
        problems += self._generator_problems()
        weights = objective.weights
        if not (weights.direct or (weights.generation and self.has_generation)):
            problems.append(
                "objective.weights: nothing is aligned with the teacher; raise direct, or generation with "
                "mask.teacher_ratio below mask.student_ratio (or set objective.kind=mae)"
            )
        return problems

    def _generator_problems(self) -> list[str]:
        heads, width, problems = self.generator_heads, self.generator_width, []
        own = self.student.generator.width is not None
        if width % heads:
            problems.append(
                f"student.generator.heads={heads} must divide "
                + (f"student.generator.width={width}" if own else f"the teacher's width {width}")
                + ": generators have that width"
            )
        positions = self.student.encoder.positions
        if own and width % POSITION_PARTS[positions]:
            problems.append(
                f"student.generator.width={width} must be a multiple of {POSITION_PARTS[positions]} "
                f"for student.encoder.positions={positions}"
            )
        return problems

    def _mask_problems(self) -> list[str]:
        mask, problems = self.mask, []
        cells, student, teacher = self.cells, self.student_hidden_cells, self.teacher_hidden_cells
        if student == 0:
            problems.append(
                f"mask.student_ratio={mask.student_ratio} hides none of {cells} cells: there is nothing to reconstruct"
            )
        if student == cells:
            problems.append(f"mask.student_ratio={mask.student_ratio} hides all of {cells} cells from the student")
        if self.objective.kind == "amd" and student == teacher and mask.student_ratio != mask.teacher_ratio:
            problems.append(
                f"mask.teacher_ratio={mask.teacher_ratio} and mask.student_ratio={mask.student_ratio} both hide "
                f"{student} of {cells} cells: increase their difference, or make them equal for symmetric masking"
            )
        if mask.decoder == "running_cell":
            grid = self.clip.grid
            if grid.height % 2 or grid.width % 2:
                problems.append(
                    f"mask.decoder=running_cell needs an even token grid, not {grid.height}x{grid.width}: "
                    "a cell is 2x2 tokens"
                )
        return problems

    @property
    def cells(self) -> int:
        """Number of cells that the masking strategy samples from: one per token (random) or per tube (tube)."""
        grid = self.clip.grid
        return grid.per_frame if self.mask.strategy == "tube" else grid.tokens

    @property
    def student_hidden_cells(self) -> int:
        """Number of cells hidden from the student."""
        return self.mask.hidden_cells(self.mask.student_ratio, self.cells)

    @property
    def teacher_hidden_cells(self) -> int:
        """Number of cells hidden from the teacher."""
        return self.mask.hidden_cells(self.mask.teacher_ratio, self.cells)

    @property
    def trains_teacher(self) -> bool:
        """Whether the run first trains its teacher, from `teacher.preset`."""
        return self.teacher is not None and self.teacher.preset is not None

    @property
    def has_generation(self) -> bool:
        """Whether generation alignment applies: some tokens are teacher-only, and its weight is above 0."""
        return (
            self.objective.kind == "amd"
            and self.teacher_hidden_cells < self.student_hidden_cells
            and self.objective.weights.generation > 0
        )

    @property
    def generator_width(self) -> int:
        """Embedding dimension of the generators, with its default resolved."""
        assert self.teacher is not None, "generators require a teacher"
        return self.student.generator.width or self.teacher.encoder.width

    @property
    def generator_heads(self) -> int:
        """Attention heads per generator block, with its default resolved."""
        return self.student.generator.heads or max(1, self.generator_width // 64)
