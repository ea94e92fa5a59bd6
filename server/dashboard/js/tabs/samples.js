// What the model answers to the job's own prompts, by step: each prompt with its answers, the newest first.
// Text nodes only: what a model writes is never read as markup.
import { html } from '../../vendor/htm-preact-3.1.1.module.js';
import { int, visible } from '../format.js';

export const isSample = ({ data }) => typeof data?.prompt === 'string' && typeof data?.text === 'string';

/** `[[prompt, [sample, ...]], ...]`; one that was repeated after a resume stands once, as it was last. */
function byPrompt(events) {
  const prompts = new Map();
  for (const { data } of events.filter(isSample)) {
    if (!prompts.has(data.prompt)) prompts.set(data.prompt, new Map());
    prompts.get(data.prompt).set(data.step, data);
  }
  return [...prompts].map(([prompt, steps]) => [prompt, [...steps.values()].sort((a, b) => b.step - a.step)]);
}

const Answer = ({ sample }) => html`
  <li>
    <span class="muted small nowrap">step ${int(sample.step)}</span>
    <span class="text">${sample.text ? visible(sample.text) : html`<span class="faint">nothing</span>`}</span>
  </li>`;

const Prompt = ({ prompt, samples }) => html`
  <section class="sample" aria-label="Answers to a prompt">
    <h3 class="text">${visible(prompt)}</h3>
    <ol class="events">${samples.map(sample => html`<${Answer} key=${sample.step} sample=${sample} />`)}</ol>
  </section>`;

const NONE = 'This job has no sample prompts, so it answers none.';
const NOT_YET = 'No sample yet. The first ones come with the first evaluation.';

export function Samples({ state, older }) {
  const prompts = byPrompt(state.events);
  const asks = state.job.wire.lomo?.sample_prompts?.length > 0;
  return html`
    ${!prompts.length && html`<p class="none muted">${asks ? NOT_YET : NONE}</p>`}
    ${prompts.map(([prompt, samples]) => html`<${Prompt} key=${prompt} prompt=${prompt} samples=${samples} />`)}
    ${asks && state.hasOlder && html`<p class="more"><button class="btn s" onClick=${older}>Read older events</button></p>`}`;
}
