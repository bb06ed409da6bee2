"""People redrawn in a standard pose, in which bones can be measured: pictures that are given, or made by an editor."""

import hashlib
from pathlib import Path
from typing import Protocol
from uuid import uuid4

import numpy as np
from PIL import Image

from preprocessing.canvas import padding_resize
from preprocessing.edit_prompts import edit_prompt
from preprocessing.pictures import Measure, load_picture
from preprocessing.types import WAN, Frames, PoseMetas, PreprocessProfile


class Editor(Protocol):
    """Redraws a picture (H, W, 3) as a prompt says; equal arguments give an equal picture (h, w, 3)."""

    def __call__(self, picture_rgb: Frames, prompt: str) -> Frames: ...

    @property
    def identity(self) -> str:
        """Network and settings: what else the result depends on."""


class StandardPoses:
    """Measures people in pictures that show them in a standard pose.

    folder: made pictures are kept in it, to be looked at, and to be made once by all workers and runs.
    """

    def __init__(
        self,
        measure: Measure,
        *,
        editor: Editor | None = None,
        folder: Path | None = None,
        profile: PreprocessProfile = WAN,
    ) -> None:
        self._measure, self._editor, self._folder, self._profile = measure, editor, folder, profile

    @property
    def can_edit(self) -> bool:
        """Say whether pictures can be made."""
        return self._editor is not None

    def given(self, path: str) -> PoseMetas:
        """Measure a picture of the user's, at its own size. Raises ValueError where it shows nobody."""
        metas = self._measure(load_picture(path))
        if metas is None:
            raise ValueError(f"edited picture {path}: no person found; give the same person in a standard pose")
        return metas

    def made(self, picture_rgb: Frames, metas: PoseMetas) -> PoseMetas:
        """Have a picture (H, W, 3) edited, and measure the result at its size.

        metas: of any number of frames of the person; what they show decides what the editor is asked for.
        Raises ValueError where the edited picture shows nobody.
        """
        assert self._editor is not None
        hw = (picture_rgb.shape[0], picture_rgb.shape[1])
        prompt = edit_prompt(metas, hw, profile=self._profile)
        edited = padding_resize(self._edited(picture_rgb, prompt), height=hw[0], width=hw[1])
        found = self._measure(edited)
        if found is None:
            raise ValueError(f"nobody is found in the picture that was edited ({prompt!r}): try another --flux-seed")
        return found

    def _edited(self, picture_rgb: Frames, prompt: str) -> Frames:
        assert self._editor is not None
        content = hashlib.sha256(np.ascontiguousarray(picture_rgb).tobytes())
        content.update(f"{picture_rgb.shape} {prompt} {self._editor.identity}".encode())
        path = self._folder / f"{content.hexdigest()[:16]}.png" if self._folder is not None else None
        if path is not None and path.is_file():
            return load_picture(str(path))
        edited = self._editor(picture_rgb, prompt)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture_rgb).save(path.with_suffix(".before.png"))
            temporary = path.with_name(f"{path.stem}-{uuid4().hex[:8]}.tmp")
            Image.fromarray(edited).save(temporary, "PNG")
            temporary.replace(path)
        return edited
