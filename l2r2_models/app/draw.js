// Draw a box by dragging on the photo, with a mouse, a pen or a finger; a tap draws nothing. With the brush, paint or erase instead.
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

const tool = () => document.querySelector('#tool input:checked')?.value ?? 'box';
const brush = () => Number(document.querySelector('#brush input[type=number]')?.value ?? 8) / 100;

const beginStroke = (picture) => {
  element.querySelectorAll('svg.stroke.done').forEach((old) => old.remove());
  const area = picture.getBoundingClientRect();
  const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg');
  svg.setAttribute('viewBox', `0 0 ${area.width} ${area.height}`);
  svg.classList.add('stroke', tool());
  svg.append(document.createElementNS('http://www.w3.org/2000/svg', 'polyline'));
  svg.firstChild.setAttribute('stroke-width', brush() * area.width);
  picture.append(svg);
  stroke = {svg, area, points: []};
};

const extendStroke = (event) => {
  const point = place(event, stroke.svg.parentElement), last = stroke.points.at(-1);
  const far = last && Math.hypot((point[0] - last[0]) * stroke.area.width, (point[1] - last[1]) * stroke.area.height);
  if (last && (far < 2 || stroke.points.length >= 10000)) return;
  stroke.points.push(point);
  const drawn = stroke.points.length > 1 ? stroke.points : [point, point];
  stroke.svg.firstChild.setAttribute('points', drawn.map(([x, y]) => `${x * stroke.area.width},${y * stroke.area.height}`).join(' '));
};

element.addEventListener('pointerdown', (event) => {
  const picture = event.target.closest('.stage .picture');
  if (!picture || event.button !== 0) return;
  event.preventDefault();
  element.setPointerCapture(event.pointerId);
  if (tool() !== 'box') {
    beginStroke(picture);
    extendStroke(event);
    return;
  }
  start = place(event, picture);
  mark = document.createElement('div');
  mark.className = 'box drawing';
  picture.append(mark);
});

element.addEventListener('pointermove', (event) => {
  if (stroke) extendStroke(event);
  if (!mark) return;
  const [x0, y0, x1, y1] = corners(event);
  Object.assign(mark.style, {left: `${100 * x0}%`, top: `${100 * y0}%`, width: `${100 * (x1 - x0)}%`, height: `${100 * (y1 - y0)}%`});
});

const finish = (event) => {
  if (stroke) {  // it stays until the page shows the new mask, or until the next one
    const {svg, points} = stroke;
    const erase = svg.classList.contains('erase');
    svg.classList.add('done');
    stroke = null;
    if (event.type === 'pointerup') trigger('select', {stroke: {points, brush: brush(), erase}});
    else svg.remove();
  }
  if (!mark) return;
  const box = corners(event);
  mark.remove();
  mark = null;
  if (event.type === 'pointerup' && box[2] - box[0] > 0.01 && box[3] - box[1] > 0.01) trigger('select', {box});
};
element.addEventListener('pointerup', finish);
element.addEventListener('pointercancel', finish);
