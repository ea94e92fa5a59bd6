// The milestones of a job, newest first: every message and evaluation, without the steps and the samples.
import { html } from '../../vendor/htm-preact-3.1.1.module.js';
import { clockSeconds, fullTime, visible } from '../format.js';
import { Icon } from '../components/icons.js';
import { isStep } from '../series.js';
import { isSample } from './samples.js';

export const isMilestone = event => !isStep(event) && !isSample(event);

const TONES = { warn: 'warn', error: 'bad' };

const Milestone = ({ event }) => html`
  <li>
    <time class="muted small" title=${fullTime(event.created_at)}>${clockSeconds(event.created_at)}</time>
    <span class=${TONES[event.level] ?? 'faint'}>
      <${Icon} name=${event.level in TONES ? event.level : 'info'} /><span class="sr">${event.level}</span>
    </span>
    <span class="text">${visible(event.message)}</span>
  </li>`;

export function Events({ state, older }) {
  const rows = state.events.filter(isMilestone).reverse();
  return html`
    <ol class="events">${rows.map(event => html`<${Milestone} key=${event.seq} event=${event} />`)}</ol>
    ${state.hasOlder && html`<p class="more"><button class="btn s" onClick=${older}>Show older events</button></p>`}`;
}
