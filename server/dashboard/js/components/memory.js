// The memory bar and its legend. Measured looks solid, planned pale or dashed, not known hatched.
import { html } from '../../vendor/htm-preact-3.1.1.module.js';
import { CATEGORIES, sumOf } from '../categories.js';
import { gb } from '../format.js';

/** Stack by category of `measured` (pale stack of `planned` without it), dashed tick at the planned peak, line at the limit. */
export function MemoryBar({ measured, planned, limit, height = 8 }) {
  const body = measured ?? planned, plannedPeak = planned ? planned.peak : null;
  const scale = Math.max(limit ?? 0, plannedPeak ?? 0, body ? sumOf(body) : 0) || 1;
  const kind = measured ? '' : planned ? 'planned' : 'unknown';
  const name = describe({ measured, planned, limit });
  return html`<span class="mem ${kind}" style=${{ '--h': `${height}px` }} role="img" aria-label=${name} title=${name}><span class="track"></span>
    ${body && html`<span class="seg-row" style=${{ width: `${(100 * sumOf(body)) / scale}%` }}>
      ${CATEGORIES.map(c => body[c.key] > 0 && html`<i class="cat-${c.key}" style=${{ width: `${(100 * body[c.key]) / sumOf(body)}%` }}></i>`)}</span>`}
    ${measured && planned && html`<span class="tick" style=${{ left: `${(100 * plannedPeak) / scale}%` }}></span>`}
    ${limit && html`<span class="lim" style=${{ left: `calc(${(100 * limit) / scale}% - 2px)` }}></span>`}</span>`;
}

function describe({ measured, planned, limit }) {
  return [
    measured ? `measured ${gb(measured.peak)} GB` : 'not measured yet',
    planned ? `planned ${gb(planned.peak)} GB` : 'plan not known',
    limit ? `limit ${gb(limit)} GB` : 'limit not known',
  ].join(', ');
}

export const MemoryLegend = () => html`<div class="legend">
  ${CATEGORIES.map(c => html`<span><i class="sw cat-${c.key}"></i>${c.name}</span>`)}
  <span><i class="sw upright dash"></i>planned peak</span><span><i class="sw upright"></i>device limit</span></div>`;
