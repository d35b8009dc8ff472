// A sound's spectrogram and waveform on a canvas. Dragging chooses a part; with Shift another one is added.
const picture = new Image();
let parts = [];
let from = null;

const seconds = () => (props.value && props.value.seconds) || 0;
const canvas = () => element.querySelector('canvas');
const number = value => Number(value.toFixed(2));

function read(text) {
  return (text || '').split(',').map(part => part.trim().split(':')).filter(ends => ends.length === 2)
    .map(([a, b]) => [a === '' ? 0 : Number(a), b === '' ? seconds() : Number(b)])
    .filter(([a, b]) => b > a);
}

function draw() {
  const place = canvas();
  if (!place || !seconds()) return;
  const ratio = window.devicePixelRatio || 1;
  const width = place.clientWidth, height = place.clientHeight;
  if (!width) return;
  place.width = width * ratio;
  place.height = height * ratio;
  const brush = place.getContext('2d');
  brush.scale(ratio, ratio);
  if (picture.complete && picture.naturalWidth) brush.drawImage(picture, 0, 0, width, height);
  brush.fillStyle = 'rgba(255, 255, 255, 0.55)';
  const peaks = props.value.peaks, most = Math.max(...peaks, 1e-3);
  peaks.forEach((peak, i) => {
    const tall = Math.max(1, peak / most * height * 0.9);
    brush.fillRect(i * width / peaks.length, (height - tall) / 2, Math.max(1, width / peaks.length - 0.5), tall);
  });
  if (element.closest('.ldm2-plain') || element.classList.contains('ldm2-plain')) return;
  for (const [a, b] of parts) {
    const left = a / seconds() * width, right = Math.min(b / seconds(), 1) * width;
    brush.fillStyle = 'rgba(56, 189, 248, 0.4)';
    brush.fillRect(left, 0, right - left, height);
    brush.fillStyle = 'rgb(56, 189, 248)';
    brush.fillRect(left, 0, 2, height);
    brush.fillRect(right - 2, 0, 2, height);
  }
}

function at(event) {
  const box = canvas().getBoundingClientRect();
  return Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1) * seconds();
}

element.addEventListener('pointerdown', event => {
  if (event.target !== canvas() || !seconds() || element.closest('.ldm2-plain')) return;
  from = at(event);
  parts = event.shiftKey ? [...parts, [from, from]] : [[from, from]];
  event.target.setPointerCapture(event.pointerId);
  event.preventDefault();
});

element.addEventListener('pointermove', event => {
  if (from === null) return;
  const to = at(event);
  parts[parts.length - 1] = [Math.min(from, to), Math.max(from, to)];
  draw();
});

element.addEventListener('pointerup', () => {
  if (from === null) return;
  from = null;
  parts = parts.filter(([a, b]) => b - a >= 0.02).sort((one, other) => one[0] - other[0]);
  draw();
  trigger('select', {times: parts.map(([a, b]) => `${number(a)}:${number(b)}`).join(', ')});
});

function shown() {
  if (!props.value) return;
  if (props.value.picture && picture.src !== props.value.picture) picture.src = props.value.picture;
  parts = read(props.value.times);
  draw();
}

picture.onload = draw;
watch('value', shown);
window.addEventListener('ldm2-times', event => { parts = read(event.detail); draw(); });
new ResizeObserver(draw).observe(element);
shown();
