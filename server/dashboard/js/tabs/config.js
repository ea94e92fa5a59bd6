// What the job was asked to do, what it ran on, and the commands that would start the same job again.
import { html } from '../../vendor/htm-preact-3.1.1.module.js';
import { createBody, createForms, optionsOf } from '../commands.js';
import { duration, gb, int, short, visible } from '../format.js';
import { Commands, Copy } from '../components/basics.js';

const sayClip = ({ mode, threshold, exact }) =>
  mode === 'none' ? 'none' : [mode, threshold, exact !== 'auto' && exact].filter(Boolean).join(', ');

const sayOption = (key, value) => {
  if (key === 'clip' && value.mode) return sayClip(value);
  return typeof value === 'object' ? JSON.stringify(value) : String(value);
};

/** `[name, value, whether the plan of the run's memory has chosen it]` of each setting. */
function settings({ auto, wire: job }) {
  const hyper = job.hyperparameters ?? {};
  const options = Object.entries(optionsOf(job)).map(([key, value]) => [
    key,
    sayOption(key, value),
  ]);
  return [
    ['n_epochs', hyper.n_epochs],
    ['batch_size', hyper.batch_size],
    ['learning_rate_multiplier', hyper.learning_rate_multiplier],
    ['seed', job.seed],
    ...options,
  ].map(([key, value]) => [key, value, auto.includes(key)]);
}

const sayTrained = lomo => (lomo?.frozen?.length ? 'some of them frozen' : 'all trained');

function facts({ job, attempts }) {
  const { wire } = job;
  return [
    ['Base model', job.base],
    ['Parameters', job.parameters === null ? 'not known yet' : `${short(job.parameters)}, ${sayTrained(wire.lomo)}`],
    ['Training file', wire.training_file],
    ['Validation file', wire.validation_file ?? 'none'],
    ['Training rows', job.rows === null ? 'not known yet' : int(job.rows)],
    ['Device', job.device ?? 'not known yet'],
    ['Device memory', job.limit ? `${gb(job.limit)} GB` : 'not known'],
    ['Tuned model', job.tuned ?? 'not made yet'],
    ['Model folder', wire.lomo?.model_path ?? 'not made yet'],
    ['Weights sha256', wire.lomo?.weights_sha256 ?? 'not made yet'],
    ['Attempts', attempts.length ? attempts.map(sayAttempt).join(' · ') : 'none yet'],
    ...Object.entries(wire.metadata ?? {}).map(([key, value]) => [`metadata.${key}`, String(value)]),
  ];
}

function sayAttempt({ number, host, started_at: start, ended_at: end, outcome }) {
  const length = start && end ? duration(end - start) : null;
  return `${number}: ${[host, outcome ?? 'runs', length].filter(Boolean).join(', ')}`;
}

const Pair = ([key, value, isChosen]) => html`
  <dt>${key}</dt>
  <dd>${visible(value)}${isChosen && html` <span class="chosen">chosen by the plan</span>`}</dd>`;

const Pairs = ({ pairs }) => html`<dl class="kv">${pairs.filter(([, value]) => value != null).map(Pair)}</dl>`;

const Unreadable = ({ keys }) => html`
  <p class="none bad">Another version of LOMO made this job. This one cannot read: ${visible(keys.join(', '))}.</p>`;

export function Config({ state }) {
  const { unreadable } = state.job.wire.lomo;
  const pairs = settings(state.job);
  const text = pairs.map(([key, value]) => `${key}: ${value}`).join('\n');
  return html`
    ${unreadable && html`<${Unreadable} keys=${unreadable} />`}
    <div class="halves">
      <div>
        <h3 class="row between">Settings <${Copy} label="settings" text=${text} /></h3>
        <${Pairs} pairs=${pairs} />
      </div>
      <div>
        <h3 class="row">What it runs on</h3>
        <${Pairs} pairs=${facts(state)} />
      </div>
    </div>
    <div class="again">
      <h3>The same job again</h3>
      <${Commands} label="create command" forms=${createForms(createBody(state.job.wire))} />
    </div>`;
}
