// Draw a box by dragging on the photo, with a mouse, a pen or a finger; a tap draws nothing.
let start = null, mark = null;

const place = (event, picture) => {
  const area = picture.getBoundingClientRect();
  const part = (value, from, size) => Math.min(Math.max((value - from) / size, 0), 1);
  return [part(event.clientX, area.left, area.width), part(event.clientY, area.top, area.height)];
};

const corners = (event) => {
  const end = place(event, mark.parentElement);
  return [Math.min(start[0], end[0]), Math.min(start[1], end[1]), Math.max(start[0], end[0]), Math.max(start[1], end[1])];
};

element.addEventListener('pointerdown', (event) => {
  const picture = event.target.closest('.stage .picture');
  if (!picture || event.button !== 0) return;
  event.preventDefault();
  start = place(event, picture);
  mark = document.createElement('div');
  mark.className = 'box drawing';
  picture.append(mark);
  element.setPointerCapture(event.pointerId);
});

element.addEventListener('pointermove', (event) => {
  if (!mark) return;
  const [x0, y0, x1, y1] = corners(event);
  Object.assign(mark.style, {left: `${100 * x0}%`, top: `${100 * y0}%`, width: `${100 * (x1 - x0)}%`, height: `${100 * (y1 - y0)}%`});
});

const finish = (event) => {
  if (!mark) return;
  const box = corners(event);
  mark.remove();
  mark = null;
  if (event.type === 'pointerup' && box[2] - box[0] > 0.01 && box[3] - box[1] > 0.01) trigger('select', {box});
};
element.addEventListener('pointerup', finish);
element.addEventListener('pointercancel', finish);
