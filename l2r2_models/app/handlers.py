"""What the controls of the page do: change the photo, and show the result or what is wrong."""

# Gradio reads the annotations of the handlers, so that they must not be strings.

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import L2R2Error
from . import markup
from .studio import Photo, Studio

NO_PHOTO = "Choose a photo first."


class Handlers:
    """Make the handlers of a page.

    A handler gets the photo and whether saliency is shown, and returns the photo, the notice, the stage, the choice of objects,
    the box, the predictions, the saliency maps, and the object on another background.

    Args:
        studio: the model.
    """

    def __init__(self, studio: Studio) -> None:
        self.studio = studio

    def after(self, change: Callable[..., Photo]) -> Callable[..., list[Any]]:
        """Make a handler that changes the photo; `change` gets it and the values of the other inputs."""

        def handler(photo: Any, saliency: bool, *inputs: Any) -> list[Any]:
            return self._show(photo, saliency, self.needs_photo(change), *inputs)

        return handler

    def after_event(self, change: Callable[[Photo, Any], Photo], key: str) -> Callable[..., list[Any]]:
        """Make a handler that changes the photo by a value of the event, which a browser sends."""
        import gradio as gr

        def handler(photo: Any, saliency: bool, event: gr.EventData) -> list[Any]:
            return self._show(photo, saliency, self.needs_photo(change), getattr(event, key, None))

        return handler

    def after_upload(self, change: Callable[[Photo | None, str], Photo]) -> Callable[..., list[Any]]:
        """Make a handler that reads an uploaded file and removes it; it also clears the component."""

        def handler(photo: Any, saliency: bool, path: str | None) -> list[Any]:
            try:
                return [*self._show(photo, saliency, change, path), None]
            finally:
                with suppress(OSError):
                    Path(str(path)).unlink()
                    Path(str(path)).parent.rmdir()

        return handler

    @staticmethod
    def needs_photo(change: Callable[..., Photo]) -> Callable[..., Photo]:
        """Return the change, or an error without a photo."""

        def checked(photo: Photo | None, *inputs: Any) -> Photo:
            if photo is None:
                raise L2R2Error(NO_PHOTO)
            return change(photo, *inputs)

        return checked

    def _show(self, photo: Photo | None, saliency: bool, change: Callable[..., Photo], *inputs: Any) -> list[Any]:
        """Show the changed photo; after an error, the sentence and the photo as it was."""
        try:
            return self._outputs(change(photo, *inputs), saliency, "")
        except L2R2Error as error:
            return self._outputs(photo, saliency, str(error))

    def _outputs(self, photo: Photo | None, saliency: bool, sentence: str) -> list[Any]:
        import gradio as gr

        if photo is None:
            return [None, markup.notice(sentence), markup.stage(None), gr.update(visible=False), "", markup.answers(None), "", ""]
        answers = maps = elsewhere = ""
        try:
            look = self.studio.look(photo, saliency)
            answers, maps = markup.answers(look), markup.maps(look)
            elsewhere = markup.elsewhere(self.studio.look_elsewhere(photo, saliency), look, photo.box)
        except L2R2Error as error:
            sentence = sentence or str(error)
        numbers = [str(i + 1) for i in range(len(photo.boxes))]
        objects = gr.update(choices=numbers, value=numbers[photo.chosen] if numbers else None, visible=len(numbers) > 1)
        box = ", ".join(f"{v:g}" for v in photo.box or ())
        return [photo, markup.notice(sentence), markup.stage(photo), objects, box, answers, maps, elsewhere]
