// The memory bar and its legends. Measured looks solid, planned pale or dashed, not known hatched.
import { html } from '../../vendor/htm-preact-3.1.1.module.js';
import { CATEGORIES, sumOf } from '../categories.js';
import { gb } from '../format.js';

/**
 * Stack by category of `measured` (without it a pale stack of `planned`), a dashed tick at the planned peak and a line at
 * the limit, in bytes.
 */
export function MemoryBar({ measured, planned, limit, height = 8 }) {
  const body = measured ?? planned;
  const total = body ? sumOf(body) : 0;
  const scale = Math.max(limit ?? 0, planned?.peak ?? 0, total) || 1;
  const share = (bytes, whole) => `${(100 * bytes) / whole}%`;
  const kind = measured ? '' : planned ? 'planned' : 'unknown';
  const name = describe({ measured, planned, limit });
  const part = ({ key }) => body[key] > 0 && html`<i class="cat-${key}" style=${{ width: share(body[key], total) }}></i>`;
  return html`
    <span class="mem ${kind}" style=${{ '--h': `${height}px` }} role="img" aria-label=${name} title=${name}>
      <span class="track"></span>
      ${body && html`<span class="seg-row" style=${{ width: share(total, scale) }}>${CATEGORIES.map(part)}</span>`}
      ${measured && planned && html`<span class="tick" style=${{ left: share(planned.peak, scale) }}></span>`}
      ${limit && html`<span class="lim" style=${{ left: `calc(${share(limit, scale)} - 2px)` }}></span>`}
    </span>`;
}

function describe({ measured, planned, limit }) {
  return [
    measured ? `measured ${gb(measured.peak)} GB` : 'not measured yet',
    planned ? `planned ${gb(planned.peak)} GB` : 'plan not known',
    limit ? `limit ${gb(limit)} GB` : 'limit not known',
  ].join(', ');
}

/** The figures of one stack by category, as `byCategory` gives them: the text form of its bar. */
export const MemoryFigures = ({ parts }) => html`<div class="legend figures">
  ${CATEGORIES.map(({ key, name }) => html`<span><i class="sw cat-${key}"></i>${name} <b>${gb(parts[key])}</b></span>`)}
  <span>peak <b>${gb(parts.peak)} GB</b></span></div>`;

export const MemoryLegend = () => html`<div class="legend">
  ${CATEGORIES.map(c => html`<span><i class="sw cat-${c.key}"></i>${c.name}</span>`)}
  <span><i class="sw upright dash"></i>planned peak</span><span><i class="sw upright"></i>device limit</span></div>`;
