// Icons as single strokes on a 16 px grid, and the mark.
import { html } from '../../vendor/htm-preact-3.1.1.module.js';

const CIRCLE = 'M8 2.2a5.8 5.8 0 1 0 .01 0';
const OPEN_RING = 'M8 2.2a5.8 5.8 0 1 1-5.8 5.8';
const PATHS = {
  running: OPEN_RING,
  validating: OPEN_RING,
  succeeded: 'M3 8.6l3.3 3.2L13 4.6',
  failed: 'M4 4l8 8M12 4l-8 8',
  paused: 'M5.5 3.5v9M10.5 3.5v9',
  queued: `${CIRCLE}M8 5v3.2l2.2 1.4`,
  cancelled: `${CIRCLE}M4 12l8-8`,
  search: 'M7 2.5a4.5 4.5 0 1 0 .01 0M10.4 10.4l3.2 3.2',
  copy: 'M5.5 5.5h8v8h-8zM2.5 10.5v-8h8',
  stop: 'M3.5 3.5h9v9h-9z',
  resume: 'M4.5 3l8 5-8 5z',
  plus: 'M8 3v10M3 8h10',
  info: `${CIRCLE}M8 7.5v3.3M8 5.2v.1`,
  warn: 'M8 2.5l6 11H2zM8 6.5v3.2M8 11.7v.1',
  error: 'M4 4l8 8M12 4l-8 8',
  sun: 'M8 5a3 3 0 1 0 .01 0M8 1v1.5M8 13.5V15M1 8h1.5M13.5 8H15M3 3l1 1M12 12l1 1M13 3l-1 1M4 12l-1 1',
  moon: 'M13.5 9.5A6 6 0 0 1 6.5 2.5a5.8 5.8 0 1 0 7 7z',
  back: 'M10 3L5 8l5 5',
};

export const Icon = ({ name, cls = '' }) =>
  html`<svg class="i ${cls}" viewBox="0 0 16 16" aria-hidden="true"><path d=${PATHS[name]} /></svg>`;

export const Logo = () => html`<svg viewBox="0 0 20 20" aria-hidden="true">
  <rect class="logo-limit" x="1.75" y=".75" width="16.5" height="18.5" rx="2.5" />
  <path class="logo-params" d="M4 15h12v2H4z" /><path class="logo-acts" d="M4 12.6h12V15H4z" />
    <path class="logo-grads" d="M4 11h12v1.6H4z" /></svg>`;
