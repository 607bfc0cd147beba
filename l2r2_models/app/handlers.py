"""What the controls of the page do: change the photo, and show the result or what is wrong."""

# Gradio reads the annotations of the handlers, so that they must not be strings.

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import L2R2Error
from . import markup
from .audited import Folder, save_report
from .studio import Photo, Studio

NO_PHOTO = "Choose a photo first."


class Handlers:
    """Make the handlers of a page.

    A handler gets the photo and whether saliency is shown, and returns the photo, the notice, the stage, what is done with a
    photo, the choice of objects and of parts, the box, the predictions, the saliency maps, the choice of backgrounds, and the
    object on another background.

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

    def after_event(self, **changes: Callable[[Photo, Any], Photo]) -> Callable[..., list[Any]]:
        """Make a handler that changes the photo by a value of the event, which a browser sends; its name says by which change."""
        import gradio as gr

        def handler(photo: Any, saliency: bool, event: gr.EventData) -> list[Any]:
            key = next((key for key in changes if hasattr(event, key)), next(iter(changes)))
            return self._show(photo, saliency, self.needs_photo(changes[key]), getattr(event, key, None))

        return handler

    def after_upload(
        self, change: Callable[[Photo | None, str], Photo], then: Callable[[Photo], Photo] | None = None
    ) -> Callable[..., list[Any]]:
        """Make a handler that reads an uploaded file and removes it; it also clears the component.

        Args:
            change: gets the photo and the path of the file.
            then: a second change; if it fails, the first one stays.
        """

        def handler(photo: Any, saliency: bool, path: str | None) -> list[Any]:
            try:
                return [*self._show(photo, saliency, change, path, then=then), None]
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

    def _show(
        self,
        photo: Photo | None,
        saliency: bool,
        change: Callable[..., Photo],
        *inputs: Any,
        then: Callable[[Photo], Photo] | None = None,
    ) -> list[Any]:
        """Show the changed photo; after an error, the sentence and the photo as it was."""
        sentence = ""
        try:
            photo = change(photo, *inputs)
            photo = photo if then is None else then(photo)
        except L2R2Error as error:
            sentence = str(error)
        return self._outputs(photo, saliency, sentence)

    def _outputs(self, photo: Photo | None, saliency: bool, sentence: str) -> list[Any]:
        import gradio as gr

        finds_object = self.studio.ifam is not None
        if photo is None:
            hidden = gr.update(visible=False)
            answers = markup.answers(None)
            return [None, markup.notice(sentence), markup.stage(None), hidden, hidden, [], "", answers, "", hidden, ""]
        answers = maps = elsewhere = ""
        try:
            look = self.studio.look(photo, saliency)
            answers, maps = markup.answers(look), markup.maps(look)
            elsewhere = markup.elsewhere(self.studio.look_elsewhere(photo, saliency), look, photo)
        except L2R2Error as error:
            sentence = sentence or str(error)
        numbers = [str(i + 1) for i in range(len(photo.boxes))]
        objects = gr.update(choices=numbers, value=numbers[photo.chosen] if numbers else None, visible=len(numbers) > 1)
        parts = [str(k) for k in range(self.studio.parts) if k not in photo.dropped]
        box, shown = ", ".join(f"{v:g}" for v in photo.box or ()), gr.update(visible=True)
        stage = markup.stage(photo, finds_object, self.studio.uses_mask)
        return [photo, markup.notice(sentence), stage, shown, objects, parts, box, answers, maps, shown, elsewhere]


def auditing(folder: Folder, reports: Path) -> Callable[..., list[Any]]:
    """Make the handler that audits `folder`: it gets the split and the number of images; reports are written to `reports`.

    It returns the notice, the result, and the file of the report.
    """
    import gradio as gr

    def handler(split: Any, images: Any, progress: Any = gr.Progress()) -> list[Any]:  # noqa: B008 (how Gradio passes it)
        def track(items: Iterable[Any], total: int, words: str) -> Iterator[Any]:
            for done, item in enumerate(items):
                progress((done, total), desc=words, unit="images")
                yield item

        try:
            run = folder.audit(split, images, track)
            file = gr.update(value=save_report(run, reports), visible=True)
            return [markup.notice(""), markup.audit(run), file]
        except L2R2Error as error:
            return [markup.notice(str(error)), "", gr.update(visible=False)]

    return handler
