// Light and dark: the system's choice unless the reader made one, which is remembered in this browser. Canvas cannot
// read light-dark() or color-mix(), so colours for it are resolved through a probe element.
import { Store } from './store.js';

const KEY = 'lomo.theme';
const media = matchMedia('(prefers-color-scheme: dark)');

function remembered() {
  try {
    return localStorage.getItem(KEY);
  } catch {
    return null; // storage can be switched off; then the system decides
  }
}

const system = () => (media.matches ? 'dark' : 'light');

export const theme = new Store(remembered() ?? system());

function apply(value) {
  document.documentElement.dataset.theme = value;
}

apply(theme.get());

media.addEventListener('change', () => {
  if (remembered()) return;
  apply(system());
  theme.set(system());
});

export function flipTheme() {
  const next = theme.get() === 'dark' ? 'light' : 'dark';
  apply(next);
  try {
    localStorage.setItem(KEY, next);
  } catch {
    // Not remembered, but it holds for this page.
  }
  theme.set(next);
}

/** The value of a colour token as `rgb(...)`. */
export function colour(token) {
  const probe = document.createElement('i');
  probe.style.color = `var(--${token})`;
  document.body.append(probe);
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
}

const channels = value =>
  value
    .match(/[\d.]+/g)
    .slice(0, 3)
    .map(Number);

export const alpha = (value, share) => `rgba(${channels(value).join(',')},${share})`;

/** `share` of colour `a` over colour `b`. */
export function mix(a, b, share) {
  const [x, y] = [channels(a), channels(b)];
  return `rgb(${x.map((v, i) => Math.round(v * share + y[i] * (1 - share))).join(',')})`;
}

/** Black or white, whichever reads better on a colour (WCAG relative luminance). */
export function inkOn(value) {
  const [r, g, b] = channels(value).map(v => ((v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.2 ? '#111' : '#fff';
}

/** A diagonal hatch as a canvas pattern: the second cue of the category Other. */
export function hatch(line, ground) {
  const ratio = devicePixelRatio;
  const tile = document.createElement('canvas');
  tile.width = tile.height = 7 * ratio;
  const c = tile.getContext('2d');
  c.fillStyle = ground;
  c.fillRect(0, 0, tile.width, tile.height);
  c.strokeStyle = line;
  c.lineWidth = 1.6 * ratio;
  for (const shift of [-7, 0, 7]) {
    c.beginPath();
    c.moveTo((shift - 1) * ratio, 8 * ratio);
    c.lineTo((shift + 8) * ratio, -ratio);
    c.stroke();
  }
  return c.createPattern(tile, 'repeat');
}

export const font = () => getComputedStyle(document.body).fontFamily;
