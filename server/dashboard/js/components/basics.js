// Small parts that every page uses.
import { html, useRef, useState } from '../../vendor/htm-preact-3.1.1.module.js';
import { loss } from '../format.js';
import { Icon } from './icons.js';

const TURNING = new Set(['running', 'validating']);

export const Pill = ({ view }) => html`
  <span class="pill ${view.key}"><${Icon} name=${view.key} cls=${TURNING.has(view.key) ? 'spin' : ''} />${view.word}</span>`;

// A copy button keeps its width when the word changes.
const COPIED_MS = 1400;
const ICONS = { Copy: 'copy', Copied: 'succeeded', Denied: 'failed' };

/** `bare`: the icon alone. */
export function Copy({ text, label, bare = false }) {
  const [word, setWord] = useState('Copy');
  const copy = () => {
    const say = answer => {
      setWord(answer);
      setTimeout(() => setWord('Copy'), COPIED_MS);
    };
    // Outside https and localhost a browser has no clipboard for pages; the text can still be marked.
    const written = navigator.clipboard ? navigator.clipboard.writeText(text) : Promise.reject();
    written.then(() => say('Copied')).catch(() => say('Denied'));
  };
  return html`
    <button class="btn quiet s" onClick=${copy} aria-label="Copy ${label}">
      <${Icon} name=${ICONS[word]} />${!bare && html`<span class="copyword">${word}</span>`}
    </button>`;
}

const BAR = { succeeded: 'done', cancelled: 'stop', failed: 'failed', paused: 'paused' };

export const Progress = ({ view }) => html`
  <span class="bar ${BAR[view.status] ?? ''}" role="progressbar" aria-label="progress"
    aria-valuenow=${Math.floor(100 * view.share)} aria-valuemin="0" aria-valuemax="100">
    <i style=${{ width: `${100 * view.share}%` }}></i>
  </span>`;

const SPARK = { width: 88, height: 24, margin: 2, right: 4 };

/** The loss so far; x is the whole planned run, so the length of the line is progress too. */
export function Spark({ curve, steps }) {
  const { width, height, margin, right } = SPARK;
  const points = curve.filter(([, y]) => y != null);
  const box = `0 0 ${width} ${height}`;
  if (points.length < 2) return html`<svg class="spark" viewBox=${box} aria-hidden="true"></svg>`;
  const losses = points.map(([, y]) => y);
  const low = Math.min(...losses);
  const high = Math.max(...losses);
  const last = Math.max(steps ?? 0, points[points.length - 1][0], 1);
  const x = step => margin + (step / last) * (width - margin - right);
  const y = value => margin + (1 - (value - low) / (high - low || 1)) * (height - 2 * margin);
  const end = points[points.length - 1];
  const line = points.map(([step, value]) => `${x(step).toFixed(1)} ${y(value).toFixed(1)}`).join('L');
  return html`
    <svg class="spark" viewBox=${box} role="img" aria-label="loss from ${loss(losses[0])} to ${loss(end[1])}">
      <path d="M${line}" />
      <circle cx=${x(end[0])} cy=${y(end[1])} r="2" />
    </svg>`;
}

/** Tabs by arrow keys. `items` are `[key, title, count]`. */
export function Tabs({ items, current, pick, label }) {
  const list = useRef();
  const onKeyDown = event => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    const next = (items.findIndex(([key]) => key === current) + by + items.length) % items.length;
    pick(items[next][0]);
    list.current.children[next].focus();
  };
  const tab = ([key, title, count]) => html`
    <button role="tab" id="tab-${key}" aria-controls="panel" aria-selected=${key === current}
      tabindex=${key === current ? 0 : -1} onClick=${() => pick(key)}>
      ${title}${count != null && html`<span>${count}</span>`}
    </button>`;
  return html`
    <div class="tabs" role="tablist" aria-label=${label} ref=${list} onKeyDown=${onKeyDown}>${items.map(tab)}</div>`;
}

export function Segments({ items, current, pick, label }) {
  const segment = ([key, title]) => html`
    <button aria-pressed=${key === current} onClick=${() => pick(key)}>${title}</button>`;
  return html`<span class="seg" role="group" aria-label=${label}>${items.map(segment)}</span>`;
}

/** A command to copy, in the forms that exist for it: `[[key, title, text], ...]`. */
export function Commands({ forms, label }) {
  const [key, setKey] = useState(forms[0][0]);
  const [, title, text] = forms.find(form => form[0] === key) ?? forms[0];
  return html`
    <div class="commands">
      <div class="row between">
        <${Segments} label="Form of the command" current=${key} pick=${setKey} items=${forms} />
        <${Copy} text=${text} label="${label}, ${title}" />
      </div>
      <pre class="code" tabindex="0" role="region" aria-label="${label}, ${title}">${text}</pre>
    </div>`;
}

/** A figure in a legend, in a reserved width. */
export const Value = ({ text, width = 5 }) => html`<b style=${{ minWidth: `${width}ch` }}>${text}</b>`;
