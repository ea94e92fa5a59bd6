// The list of jobs. Rows keep their order until the reader sorts or reloads; new jobs enter on top.
import { html, useEffect, useMemo, useRef, useState } from '../../vendor/htm-preact-3.1.1.module.js';
import { firstJobForms } from '../commands.js';
import { Commands } from '../components/basics.js';
import { Icon } from '../components/icons.js';
import { JobsTable, Skeleton } from '../components/jobstable.js';
import { MemoryLegend } from '../components/memory.js';
import { sayError } from '../format.js';
import { useAfter, useKeys, useNow } from '../hooks.js';
import { JobsFeed } from '../jobsfeed.js';
import { searchText } from '../jobview.js';
import { route, setQuery } from '../router.js';
import { NEWEST_FIRST, ordered } from '../sorting.js';

const SKELETON_MS = 150;
const RELATIVE_TIMES_MS = 10_000;

const FILTERS = [
  ['all', 'All'],
  ['running', 'Running'],
  ['waiting', 'Waiting'],
  ['paused', 'Paused'],
  ['succeeded', 'Succeeded'],
  ['failed', 'Failed'],
  ['cancelled', 'Cancelled'],
];
const WAITING = new Set(['queued', 'validating_files']);

const passes = (view, filter) =>
  filter === 'all' || view.status === filter || (filter === 'waiting' && WAITING.has(view.status));

/** The ids of the jobs in the order that the reader chose, kept while figures change. */
function useOrder(jobs, sort) {
  const kept = useRef({ sort: null, ids: [] });
  if (!jobs) return [];
  const byId = new Map(jobs.map(view => [view.id, view]));
  if (kept.current.sort !== sort) kept.current = { sort, ids: ordered(jobs, sort).map(view => view.id) };
  else {
    const known = new Set(kept.current.ids);
    const fresh = jobs.filter(view => !known.has(view.id)).map(view => view.id);
    const newer = jobs.length && fresh.includes(jobs[0].id);
    kept.current.ids = newer ? [...fresh, ...kept.current.ids] : [...kept.current.ids, ...fresh];
  }
  return kept.current.ids.map(id => byId.get(id)).filter(Boolean);
}

const Chip = ([key, title], jobs, filter) => html`
  <button class="chip" aria-pressed=${filter === key} onClick=${() => setQuery({ status: key === 'all' ? '' : key })}>
    ${title} <b>${jobs.filter(view => passes(view, key)).length}</b>
  </button>`;

function Head({ jobs, filter, search, box, asking, ask }) {
  const onInput = event => setQuery({ q: event.target.value });
  return html`
    <div class="pagehead">
      <h1>Jobs</h1>
      <div class="chips grow" role="group" aria-label="Filter by status">
        ${jobs.length > 0 && FILTERS.map(item => Chip(item, jobs, filter))}
      </div>
      <label class="search" hidden=${!jobs.length}>
        <${Icon} name="search" />
        <input ref=${box} class="inp" placeholder="Name, model, host, id" aria-label="Search jobs"
          value=${search} onInput=${onInput} />
        <kbd>/</kbd>
      </label>
      <button class="btn primary" aria-expanded=${asking} hidden=${!jobs.length} onClick=${ask}>
        <${Icon} name="plus" />New job
      </button>
    </div>`;
}

const NewJob = ({ close }) => html`
  <section class="card newjob" aria-label="New job">
    <header><h2 class="grow">New job</h2><button class="btn s" onClick=${close}>Close</button></header>
    <div class="pad">
      <p class="muted small">
        Jobs are started from a terminal or a program. Change the model and the file, then run one of these; the job
        appears here at once.
      </p>
      <${Commands} label="command for a new job" forms=${firstJobForms()} />
    </div>
  </section>`;

const Empty = () => html`
  <div class="empty">
    <h2>No jobs yet</h2>
    <p class="muted">
      A job tunes every weight of a model on a file of your examples.<br />It appears here as soon as it is created.
    </p>
    <${Commands} label="command for a first job" forms=${firstJobForms()} />
  </div>`;

const NoMatch = ({ total, words }) => html`
  <div class="empty">
    <h2>No job matches</h2>
    <p class="muted">None of ${total} jobs fits “${words}”.</p>
    <button class="btn" onClick=${() => setQuery({ q: '', status: '' })}>Show all jobs</button>
  </div>`;

const Unreadable = ({ error, retry }) => html`
  <div class="empty">
    <h2>The job list could not be read</h2>
    <p class="muted">${sayError(error)}</p>
    <button class="btn primary" onClick=${retry}>Try again</button>
  </div>`;

const Foot = ({ state, feed }) => html`
  <div class="row wrap between listfoot">
    <${MemoryLegend} />
    ${state.hasMore && html`
      <span class="row small muted">
        the newest ${state.jobs.length} jobs <button class="btn s" onClick=${() => feed.more()}>Show older</button>
      </span>`}
    <span class="small faint hide-s">
      <kbd>j</kbd> <kbd>k</kbd> move · <kbd>Enter</kbd> open · <kbd>n</kbd> new job · <kbd>/</kbd> search
    </span>
  </div>`;

export function JobsPage() {
  const feed = useMemo(() => new JobsFeed(), []);
  const state = feed.state.use();
  const now = useNow(RELATIVE_TIMES_MS);
  const late = useAfter(SKELETON_MS);
  const { query } = route.use();
  const box = useRef();
  const at = useRef(-1);
  const [current, setCurrent] = useState(-1);
  const [asking, setAsking] = useState(false);
  const sort = query.get('sort') || NEWEST_FIRST;
  const filter = query.get('status') || 'all';
  const search = query.get('q') ?? '';
  const jobs = state.jobs ?? [];
  const inOrder = useOrder(state.jobs, sort);
  const rows = inOrder.filter(view => passes(view, filter) && searchText(view).includes(search.toLowerCase()));

  useEffect(() => {
    document.title = 'Jobs · LOMO';
    feed.start();
    return () => feed.stop();
  }, []);
  const move = by => {
    at.current = Math.max(0, Math.min(rows.length - 1, at.current + by)); // a ref: keys can be faster than renders
    setCurrent(at.current);
  };
  useKeys({
    '/': event => {
      event.preventDefault();
      box.current?.focus();
    },
    j: () => move(1),
    k: () => move(-1),
    Enter: event =>
      event.target === document.body && rows[at.current] && (location.hash = `#/job/${rows[at.current].id}`),
    n: () => setAsking(true),
  });

  return html`
    <${Head} jobs=${jobs} filter=${filter} search=${search} box=${box} asking=${asking} ask=${() => setAsking(!asking)} />
    ${asking && jobs.length > 0 && html`<${NewJob} close=${() => setAsking(false)} />`}
    <div class="card">
      <${Body} state=${state} rows=${rows} late=${late} words=${search || filter} retry=${() => feed.retry()}
        current=${current} sort=${sort} now=${now} />
    </div>
    ${jobs.length > 0 && html`<${Foot} state=${state} feed=${feed} />`}`;
}

function Body({ state, rows, late, words, retry, ...table }) {
  if (state.jobs === null && state.error) return html`<${Unreadable} error=${state.error} retry=${retry} />`;
  if (state.jobs === null) return late && html`<${Skeleton} />`;
  if (!state.jobs.length) return html`<${Empty} />`;
  if (!rows.length) return html`<${NoMatch} total=${state.jobs.length} words=${words} />`;
  return html`<${JobsTable} rows=${rows} ...${table} />`;
}
