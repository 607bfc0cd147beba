// Drag on the photo, with a mouse, a pen or a finger: draw a box, or a stroke if a brush is chosen. A tap draws no box.
let start = null, mark = null, stroke = null;

const place = (event, picture) => {
  const area = picture.getBoundingClientRect();
  const part = (value, from, size) => Math.min(Math.max((value - from) / size, 0), 1);
  return [part(event.clientX, area.left, area.width), part(event.clientY, area.top, area.height)];
};

const corners = (event) => {
  const end = place(event, mark.parentElement);
  return [Math.min(start[0], end[0]), Math.min(start[1], end[1]), Math.max(start[0], end[0]), Math.max(start[1], end[1])];
};

const add = (event) => {
  const point = place(event, mark.parentElement);
  const pen = mark.getContext('2d');
  const last = stroke.points.at(-1) ?? point;
  stroke.points.push(point);
  Object.assign(pen, {lineCap: 'round', lineWidth: 2 * stroke.radius * mark.width, strokeStyle: stroke.erase ? '#ffffff99' : '#ff00aa99'});
  pen.beginPath();
  pen.moveTo(last[0] * mark.width, last[1] * mark.height);
  pen.lineTo(point[0] * mark.width, point[1] * mark.height);
  pen.stroke();
};

element.addEventListener('pointerdown', (event) => {
  const picture = event.target.closest('.stage .picture');
  if (!picture || event.button !== 0) return;
  event.preventDefault();
  element.querySelectorAll('.stroke').forEach((old) => old.remove());
  const tool = document.querySelector('#brush input:checked')?.value ?? 'box';
  if (tool === 'box') {
    start = place(event, picture);
    mark = document.createElement('div');
    mark.className = 'box drawing';
    picture.append(mark);
  } else {
    const size = Number(document.querySelector('#width input[type=range]').value);
    stroke = {points: [], radius: size / 200, erase: tool === 'erase'};
    mark = Object.assign(document.createElement('canvas'), {className: 'stroke', width: picture.clientWidth, height: picture.clientHeight});
    picture.append(mark);
    add(event);
  }
  element.setPointerCapture(event.pointerId);
});

element.addEventListener('pointermove', (event) => {
  if (!mark) return;
  if (stroke) return add(event);
  const [x0, y0, x1, y1] = corners(event);
  Object.assign(mark.style, {left: `${100 * x0}%`, top: `${100 * y0}%`, width: `${100 * (x1 - x0)}%`, height: `${100 * (y1 - y0)}%`});
});

const finish = (event) => {
  if (!mark) return;
  const drawn = stroke, box = drawn ? null : corners(event);
  if (!drawn || event.type !== 'pointerup') mark.remove();  // a stroke stays until the mask with it is shown
  mark = stroke = null;
  if (event.type !== 'pointerup') return;
  if (drawn) trigger('select', {stroke: drawn});
  else if (box[2] - box[0] > 0.01 && box[3] - box[1] > 0.01) trigger('select', {box});
};
element.addEventListener('pointerup', finish);
element.addEventListener('pointercancel', finish);
