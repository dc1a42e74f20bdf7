"""Clips from a camera moving through a 3-D world, rendered by ViZDoom and labelled by the camera's motion.

Opposite motions, such as left and right turns, are time reversals of each other, so single frames do not reveal the
label. Each split uses different levels. Game elements are removed: there are no opponents, weapons or status displays.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from amd.data.dataset.clip_files import write_clips
from amd.data.packaged.source import WriteOptions

MOTIONS = ("MOVE_FORWARD", "MOVE_BACKWARD", "MOVE_LEFT", "MOVE_RIGHT", "TURN_LEFT", "TURN_RIGHT")
LEVELS = {"train": range(1, 21), "select": range(21, 25), "test": range(25, 31)}  # levels of Freedoom: Phase 2
COUNTS = {"train": 3000, "select": 600, "test": 900}
FRAMES, TICS_PER_FRAME, RATE = 16, 2, 17  # 35 tics per second
MIN_DISTANCE, MIN_TURN = 40.0, 20.0  # map units and degrees that a clip must cover; less means a wall is in the way
CLIPS_PER_LEVEL = 30  # before the next level is loaded


def write_ego_motion(source: Path, output: Path, options: WriteOptions) -> dict[str, int]:
    """Write SPLIT/list.txt and SPLIT/NNNNN.mp4: clips of 16 frames of 160x120 pixels."""
    counts = {}
    for number, (split, levels) in enumerate(LEVELS.items()):
        count = min(options.samples or COUNTS[split], COUNTS[split])
        labels = np.arange(count) % len(MOTIONS)
        clips = record(source, levels, labels.tolist(), seed=options.seed * len(LEVELS) + number)
        write_clips(output / split, clips, labels.tolist(), rate=RATE)
        counts[f"{split}/list.txt"] = count
    return counts


def record(source: Path, levels: range, labels: list[int], seed: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield one clip (16, 120, 160, 3) per label, each recorded in a different place."""
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder, chdir(folder):  # ViZDoom writes files to the working directory
        game = _game(source, int(rng.integers(2**31)))
        try:
            for number, label in enumerate(labels):
                if number % CLIPS_PER_LEVEL == 0:
                    game.set_doom_map(f"MAP{rng.choice(levels):02}")
                    game.new_episode()
                    game.send_game_command("god")  # a viewer who dies stops moving
                yield _clip(game, label, rng)
        finally:
            game.close()


def _clip(game: Any, label: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    while True:
        _wander(game, rng)
        start = game.get_state().game_variables
        frames = []
        for _ in range(FRAMES):
            game.make_action(_action(label), TICS_PER_FRAME)
            frames.append(game.get_state().screen_buffer.copy())
        end = game.get_state().game_variables
        turned = abs((end[2] - start[2] + 180) % 360 - 180)
        if turned >= MIN_TURN or np.hypot(*(end[:2] - start[:2])) >= MIN_DISTANCE:
            return np.stack(frames)


def _wander(game: Any, rng: np.random.Generator) -> None:
    """Turn by a random angle, walk, then stand still until no earlier motion remains."""
    game.make_action(_action(4 + int(rng.integers(2))), int(rng.integers(1, 40)))
    game.make_action(_action(0), int(rng.integers(10, 60)))
    game.make_action([0] * len(MOTIONS), 20)


def _action(label: int) -> list[int]:
    return [int(label == motion) for motion in range(len(MOTIONS))]


def _game(source: Path, seed: int) -> Any:
    import vizdoom

    game = vizdoom.DoomGame()
    game.set_doom_scenario_path(str(source / "freedoom2.wad"))
    game.set_doom_config_path(str(Path.cwd() / "config.ini"))
    game.set_screen_resolution(vizdoom.ScreenResolution.RES_160X120)
    game.set_screen_format(vizdoom.ScreenFormat.RGB24)
    game.set_window_visible(False)
    game.set_sound_enabled(False)
    game.set_render_hud(False)
    game.set_render_weapon(False)
    game.set_mode(vizdoom.Mode.PLAYER)
    game.set_episode_timeout(0)
    game.set_seed(seed)
    game.add_game_args("-nomonsters +sv_cheats 1")
    game.set_available_buttons([getattr(vizdoom.Button, motion) for motion in MOTIONS])
    variables = vizdoom.GameVariable
    game.set_available_game_variables([variables.POSITION_X, variables.POSITION_Y, variables.ANGLE])
    game.init()
    return game
