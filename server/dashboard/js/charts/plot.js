// One uPlot in a Preact component, and what the charts of a page share: the crosshair and the zoom. An instance is built
// anew on a change of theme or of `dep` only; new points go in by setData, and heights are fixed, so nothing shifts.
import { html, useEffect, useRef } from '../../vendor/htm-preact-3.1.1.module.js';
import { CATEGORIES } from '../categories.js';
import { Store } from '../store.js';
import { colour, mix, theme } from '../theme.js';

const { uPlot } = window;
const SYNC_KEY = 'job';
const SERIES = [1, 2, 3, 4];

/** Index of the crosshair in the common x of the page's charts, or null: the latest values. */
export const cursorIndex = new Store(null);

/** `[first step, last step]` of every chart of the page, or null: the whole planned run. */
export const zoom = new Store(null);

function palette() {
  const surface = colour('surface');
  const categories = CATEGORIES.map(c => colour(`c-${c.key}`));
  return {
    surface,
    categories,
    // Opaque, so that layers do not mix; Other is paler, for its hatch to stand out.
    soft: categories.map((value, i) => mix(value, surface, CATEGORIES[i].key === 'other' ? 0.38 : 0.74)),
    series: SERIES.map(n => colour(`s-${n}`)),
    ...Object.fromEntries(['text', 'muted', 'faint', 'line', 'warn'].map(name => [name, colour(name)])),
  };
}

function cursorOptions(extra) {
  return {
    points: { size: 6, width: 1.5 },
    y: false,
    drag: { x: true, y: false, setScale: false },
    sync: { key: SYNC_KEY, scales: ['x', null] },
    bind: { dblclick: () => () => zoom.set(null) },
    ...extra,
  };
}

/** Hooks that carry the crosshair and a dragged range to the page; only the chart that is dragged in decides the zoom. */
function sharedHooks() {
  let pressed = false;
  return {
    ready: [u => u.over.addEventListener('mousedown', () => (pressed = true))],
    setCursor: [u => cursorIndex.set(u.cursor.idx ?? null)],
    setSelect: [
      u => {
        const { left, width } = u.select;
        if (pressed && width > 0) zoom.set([u.posToVal(left, 'x'), u.posToVal(left + width, 'x')]);
        pressed = false;
      },
    ],
  };
}

const merged = (a, b = {}) =>
  Object.fromEntries(
    [...new Set([...Object.keys(a), ...Object.keys(b)])].map(key => [key, [...(a[key] ?? []), ...(b[key] ?? [])]]),
  );

/** `build(palette)` returns uPlot's options less size, cursor and x scale; `steps` is the end of the whole planned run. */
export function Plot({ data, height, build, dep, steps, summary }) {
  const box = useRef();
  const plot = useRef();
  const end = useRef();
  const current = theme.use();
  const range = zoom.use();
  end.current = Math.max(steps ?? 0, data[0][data[0].length - 1], 1);

  useEffect(() => {
    const element = box.current;
    const options = build(palette());
    const x = { time: false, range: () => zoom.get() ?? [0, end.current] };
    const u = new uPlot(
      {
        padding: [8, 18, 0, 0], // on the right for half of the last label
        ...options,
        scales: { x, ...options.scales },
        hooks: merged(sharedHooks(), options.hooks),
        cursor: cursorOptions(options.cursor),
        legend: { show: false },
        width: element.clientWidth,
        height,
      },
      data,
      element,
    );
    plot.current = u;
    const observer = new ResizeObserver(() => element.clientWidth && u.setSize({ width: element.clientWidth, height }));
    observer.observe(element);
    return () => {
      observer.disconnect();
      u.destroy();
    };
  }, [current, dep]);

  useEffect(() => {
    const u = plot.current;
    if (u.data !== data) u.setData(data);
  }, [data]);

  useEffect(() => {
    const u = plot.current;
    u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    u.setScale('x', { min: range?.[0] ?? 0, max: range?.[1] ?? 1 }); // the scale's own range decides
  }, [range, steps]);

  const onKeyDown = event => {
    const u = plot.current;
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === 'Escape') zoom.set(null);
    if (!by) return;
    event.preventDefault();
    const last = data[0].length - 1;
    const index = Math.max(0, Math.min(last, (u.cursor.idx ?? last) + by * (event.shiftKey ? 10 : 1)));
    u.setCursor({ left: u.valToPos(data[0][index], 'x'), top: 10 }, true, true);
  };
  const onBlur = () => plot.current.setCursor({ left: -10, top: -10 }, true, true);
  return html`
    <div class="plot" ref=${box} style=${{ height: `${height}px` }} tabindex="0" role="img" aria-label=${summary}
      onKeyDown=${onKeyDown} onBlur=${onBlur}></div>`;
}
