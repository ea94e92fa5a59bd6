// What can be resumed from or taken away.
import { html } from '../../vendor/htm-preact-3.1.1.module.js';
import { clock, fullTime, gb, int, loss } from '../format.js';

function sayNone({ checkpoint_every_steps: every }) {
  if (every === 0) return 'This job writes no checkpoint before its final model.';
  return `No checkpoint yet; one is written every ${int(every)} steps.`;
}

const Row = ({ checkpoint: c }) => html`
  <tr>
    <td class="strong">${int(c.step_number)}</td>
    <td class="num">${loss(c.metrics?.train_loss)}</td>
    <td class="num">${loss(c.metrics?.valid_loss)}</td>
    <td class="num">${gb(c.bytes)} GB</td>
    <td class="mono xs">${c.fine_tuned_model_checkpoint}</td>
    <td class="muted nowrap"><time title=${fullTime(c.created_at)}>${clock(c.created_at)} UTC</time></td>
  </tr>`;

/** The step of the best evaluation whose model is kept, as the newest checkpoint tells it. */
function bestStep(events) {
  const told = events.filter(event => event.data?.manifest_sha256);
  return told.length ? (told[told.length - 1].data.best_step ?? null) : null;
}

export function Checkpoints({ state }) {
  const best = bestStep(state.events);
  if (!state.checkpoints.length) return html`<p class="none muted">${sayNone(state.job.wire.lomo)}</p>`;
  return html`
    <div class="scroll" tabindex="0" role="region" aria-label="Checkpoints">
      <table>
        <thead>
          <tr>
            <th>Step</th><th class="num">Train loss</th><th class="num">Valid loss</th><th class="num">Size</th>
            <th>Name</th><th>Saved</th>
          </tr>
        </thead>
        <tbody>${state.checkpoints.map(c => html`<${Row} key=${c.id} checkpoint=${c} />`)}</tbody>
      </table>
    </div>
    ${best !== null && html`<p class="small foot">Best evaluation: step <b>${int(best)}</b>; its model is kept, too.</p>`}`;
}
