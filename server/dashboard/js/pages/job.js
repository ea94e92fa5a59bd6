// One job: is it alive, is it learning, does it fit, when is it done.
import { html, useEffect, useMemo, useRef, useState } from '../../vendor/htm-preact-3.1.1.module.js';
import { byCategory } from '../categories.js';
import { GradientChart } from '../charts/gradient.js';
import { LossChart, lossText } from '../charts/loss.js';
import { MemoryChart } from '../charts/memory.js';
import { cursorIndex, zoom } from '../charts/plot.js';
import { SpeedChart } from '../charts/speed.js';
import { Copy, Pill, Tabs } from '../components/basics.js';
import { CancelButton } from '../components/cancel.js';
import { Icon } from '../components/icons.js';
import { KeyFigures } from '../components/keyfigures.js';
import { MemoryBar, MemoryFigures } from '../components/memory.js';
import { PauseButton } from '../components/pause.js';
import { PlanTable } from '../components/plantable.js';
import { age, clock, clockSeconds, fullTime, gb, int, loss, sayError, visible } from '../format.js';
import { useAfter, useNow } from '../hooks.js';
import { JobFeed } from '../jobfeed.js';
import { deviceName, progressText, waits } from '../jobview.js';
import { replaceRoute, route, setQuery } from '../router.js';
import { attemptStarts, smooth, valueAt } from '../series.js';
import { Checkpoints } from '../tabs/checkpoints.js';
import { Config } from '../tabs/config.js';
import { Evaluation } from '../tabs/evaluation.js';
import { Events, isMilestone } from '../tabs/events.js';
import { Log } from '../tabs/log.js';
import { Samples } from '../tabs/samples.js';

const TABS = {
  events: Events,
  log: Log,
  checkpoints: Checkpoints,
  evaluation: Evaluation,
  samples: Samples,
  config: Config,
};
const DEFAULT_SMOOTHING = 0.6; // of the past kept per point; the same in every chart and key figure
const REFINE_AFTER_MS = 250;
const RELATIVE_TIMES_MS = 10_000;
const SKELETON_MS = 150;

/** The zoom of the charts, kept in the address: read once, written on each change. `drawn`: the history has been read. */
function useZoomInAddress(feed, drawn) {
  // Without the finer window the charts stay as coarse as they are, which is no error to report.
  const refine = range => range && feed.refine(...range).catch(() => {});
  useEffect(() => {
    if (drawn) refine(zoom.get());
  }, [drawn]);
  useEffect(() => {
    const [from, to] = (route.get().query.get('zoom') ?? '').split('-').map(Number);
    zoom.set(to > from ? [from, to] : null);
    let timer = null;
    const unsubscribe = zoom.subscribe(range => {
      setQuery({ zoom: range && range.map(step => step.toFixed(1).replace(/\.0$/, '')).join('-') });
      clearTimeout(timer);
      timer = setTimeout(() => refine(range), REFINE_AFTER_MS);
    });
    return () => {
      clearTimeout(timer);
      unsubscribe();
      zoom.set(null);
      cursorIndex.set(null);
    };
  }, [feed]);
}

function Head({ view, checkpoints, feed }) {
  return html`
    <div class="row wrap jobhead">
      <a class="btn quiet s" href="#/jobs" aria-label="All jobs"><${Icon} name="back" /></a>
      <h1 class="ell" title=${view.name}>${visible(view.name)}</h1>
      <${Pill} view=${view} />
      <span class="grow"></span>
      <${PauseButton} view=${view} pause=${() => feed.pause()} resume=${() => feed.resume()} />
      <${CancelButton} view=${view} checkpoints=${checkpoints} cancel=${() => feed.cancel()} />
    </div>`;
}

function sayWhen(view, now) {
  if (!view.startedAt) return html`created <${Clock} at=${view.createdAt} />`;
  const seconds = now - view.startedAt;
  return html`started <b>${seconds < 60 ? 'just now' : `${age(seconds)} ago`}</b>, <${Clock} at=${view.startedAt} />`;
}

const Clock = ({ at }) => html`<time title=${fullTime(at)}>${clock(at)} UTC</time>`;

function Facts({ view, now }) {
  const device = view.device && `, ${deviceName(view)}`;
  return html`
    <div class="facts">
      <span class="row tight"><span class="mono">${view.id}</span><${Copy} text=${view.id} label="job id" bare /></span>
      <span><b>${view.base}</b>${view.tuned && html` → <b>${view.tuned}</b>`}</span>
      <span>${view.host ? html`on <b>${view.host}</b>${device}` : 'on no host yet'}</span>
      <span>${sayWhen(view, now)}</span>
      ${view.attempt > 0 && html`<span>attempt <b>${view.attempt}</b></span>`}
      ${view.optimizer && html`<span><b>${view.optimizer}</b>${view.precision && `, ${view.precision}`}</span>`}
    </div>`;
}

/** Before the first step: what the job waits for, and its plan as a pale stack. */
function Waiting({ view }) {
  const [what, why] = view.status === 'queued' ? waits(view) : [view.over ? view.word : progressText(view)[0], ''];
  const plan = view.plannedPeak ? `Planned peak ${gb(view.plannedPeak)} GB. ` : 'Its memory is not planned. ';
  const charts = view.over ? 'There is nothing to draw: no step was taken.' : 'Charts appear here with the first step.';
  return html`
    <div class="card">
      <div class="empty">
        <h2>${visible(what)}</h2>
        ${why && html`<p>${visible(why.charAt(0).toUpperCase() + why.slice(1))}</p>`}
        <p class="muted">${plan}${charts}</p>
        <div class="wide">
          <${MemoryBar} measured=${view.measured} planned=${view.planned} limit=${view.limit} height=${12} />
          ${view.planned && html`<${MemoryFigures} parts=${view.planned} />`}
        </div>
      </div>
    </div>`;
}

// What helps, by the error's code (lomo_core/errors.py, jobs/lifecycle.py); where memory ran out the message says it.
const REMEDIES = {
  engine_lost: 'Read the log of the last attempt: a job that is killed each time often needs more memory than its host has.',
  diverged: 'Use a smaller learning_rate, or clip by norm.',
  disk_full: 'Free space in the data folder, or keep fewer checkpoints.',
};

/**
 * What the run held when its memory ran out, as the engine's last event tells it. Where the model was not even loaded
 * (its size is not known) it tells its plan.
 */
function Account({ view, memory }) {
  const parts = byCategory(memory);
  const isPlan = view.parameters === null;
  return html`
    <div class="held">
      <p class="small muted">${isPlan ? 'What the run needs by its plan' : 'What the run held'}, in GB</p>
      <${MemoryBar} measured=${isPlan ? null : parts} planned=${isPlan ? parts : view.planned} limit=${view.limit}
        height=${10} />
      <${MemoryFigures} parts=${parts} />
    </div>`;
}

/** Cause and remedy; a message's further lines are a table. */
function Failure({ view, events }) {
  const { code, message } = view.error;
  const [first, ...rest] = visible(message).split('\n');
  const last = code === 'out_of_memory' && events.filter(event => event.level === 'error' && event.data?.memory).pop();
  return html`
    <div class="card failure">
      <b class="bad">${first}</b>
      ${REMEDIES[code] && html`<span> ${REMEDIES[code]}</span>`}
      <span class="faint mono xs"> ${code}</span>
      ${rest.length > 0 && html`<pre class="account">${rest.join('\n')}</pre>`}
      ${last && html`<${Account} view=${view} memory=${last.data.memory} />`}
    </div>`;
}

const HINT = 'drag to zoom all charts · double-click to reset · ← → move the crosshair';

function Tools({ columns, smoothing, setSmoothing, log, setLog }) {
  const index = cursorIndex.use();
  const at = index ?? columns.step.length - 1;
  const onSmooth = event => setSmoothing(Number(event.target.value));
  return html`
    <div class="tools">
      <span class="where">
        step <b>${int(columns.step[at])}</b>${` · ${clockSeconds(valueAt(columns.time, at))} UTC`}
        ${index === null && ' · latest'}
      </span>
      <label>
        Smoothing <input type="range" min="0" max="0.98" step="0.01" value=${smoothing} onInput=${onSmooth} />
        <span class="four">${smoothing.toFixed(2)}</span>
      </label>
      <label><input type="checkbox" checked=${log} onChange=${event => setLog(event.target.checked)} />Log loss</label>
      <span class="grow"></span>
      ${zoom.use()
        ? html`<button class="btn s" onClick=${() => zoom.set(null)}>Show the whole run</button>`
        : html`<span class="faint hide-s">${HINT}</span>`}
    </div>`;
}

function Charts({ view, columns, smoothing, setSmoothing }) {
  const [log, setLog] = useState(false);
  const starts = useRef([]);
  starts.current = useMemo(() => attemptStarts(columns), [columns]);
  const shared = { view, columns, starts };
  return html`
    <${Tools} columns=${columns} smoothing=${smoothing} setSmoothing=${setSmoothing} log=${log} setLog=${setLog} />
    <div class="charts">
      <${MemoryChart} ...${shared} />
      <${LossChart} ...${shared} smoothing=${smoothing} log=${log} />
      <${GradientChart} ...${shared} />
      <${SpeedChart} ...${shared} />
      <${PlanTable} view=${view} />
    </div>`;
}

function Details({ state, feed, tab }) {
  const pick = key => replaceRoute({ ...route.get(), tab: key });
  const items = [
    ['events', 'Events', state.events.filter(isMilestone).length],
    ['log', 'Log', null],
    ['checkpoints', 'Checkpoints', state.checkpoints.length],
    ['evaluation', 'Evaluation', null],
    ['samples', 'Samples', null],
    ['config', 'Config', null],
  ];
  return html`
    <section class="card details" aria-label="Details">
      <${Tabs} label="Job details" current=${tab} pick=${pick} items=${items} />
      <div class="panel" role="tabpanel" id="panel" aria-labelledby="tab-${tab}">
        <${TABS[tab]} state=${state} older=${() => feed.older()} />
      </div>
    </section>`;
}

/** The row's figures, brought up to the newest step that the events told. */
function upToDate(view, columns) {
  if (!columns || view.over) return view;
  const last = columns.step.length - 1;
  const step = Math.max(view.step, columns.time[last] === null ? 0 : columns.step[last]);
  return {
    ...view,
    step,
    share: view.steps ? Math.min(1, step / view.steps) : 0,
    tokensPerSecond: valueAt(columns.tokens_per_s, last) ?? view.tokensPerSecond,
  };
}

/** The smoothed loss at the newest step as text. */
function newestLoss(view, columns, smoothing) {
  if (!columns) return loss(view.loss);
  return lossText(columns, smooth(columns.loss, smoothing), columns.step.length - 1);
}

function useTitle(view) {
  const done = view && (view.over ? view.word : `${Math.floor(100 * view.share)} %`);
  const title = view ? `${done} ${visible(view.name)} · LOMO` : 'Job · LOMO';
  useEffect(() => {
    document.title = title;
  }, [title]);
}

export function JobPage({ id, tab }) {
  const feed = useMemo(() => new JobFeed(id), [id]);
  const state = feed.state.use();
  const now = useNow(RELATIVE_TIMES_MS);
  const late = useAfter(SKELETON_MS);
  const [smoothing, setSmoothing] = useState(DEFAULT_SMOOTHING);
  useEffect(() => {
    feed.start();
    return () => feed.stop();
  }, [feed]);
  const { columns } = state;
  useZoomInAddress(feed, columns !== null);
  const view = state.job && upToDate(state.job, columns);
  useTitle(view);

  if (!view && state.error) return html`<${Unreadable} error=${state.error} retry=${() => feed.retry()} />`;
  if (!view) return late && html`<div class="card" aria-busy="true"><div class="empty muted">Reading the job</div></div>`;
  const figures = { view, evaluations: state.evaluations, now, lossText: newestLoss(view, columns, smoothing) };
  return html`
    <${Head} view=${view} checkpoints=${state.checkpoints} feed=${feed} />
    <${Facts} view=${view} now=${now} />
    ${view.error && html`<${Failure} view=${view} events=${state.events} />`}
    ${columns && html`<${KeyFigures} ...${figures} />`}
    ${columns && html`<${Charts} view=${view} columns=${columns} smoothing=${smoothing} setSmoothing=${setSmoothing} />`}
    ${!columns && html`<${Waiting} view=${view} />`}
    <${Details} state=${state} feed=${feed} tab=${tab in TABS ? tab : 'events'} />`;
}

function Unreadable({ error, retry }) {
  const unknown = error.status === 404;
  return html`
    <div class="card">
      <div class="empty">
        <h1>${unknown ? 'No such job' : 'The job could not be read'}</h1>
        <p class="muted">${sayError(error)}</p>
        <div class="row">
          ${!unknown && html`<button class="btn primary" onClick=${retry}>Try again</button>`}
          <a class="btn" href="#/jobs">All jobs</a>
        </div>
      </div>
    </div>`;
}
