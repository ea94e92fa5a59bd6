// The worker hosts: the memory that jobs may take there, what running ones were promised of it, and which they are.
import { html, useEffect, useMemo } from '../../vendor/htm-preact-3.1.1.module.js';
import { Commands } from '../components/basics.js';
import { Icon } from '../components/icons.js';
import { duration, fullTime, gb, int, MISSING, sayError, visible } from '../format.js';
import { useAfter, useNow } from '../hooks.js';
import { HostsFeed } from '../hostsfeed.js';

const AGES_MS = 1_000;
const SKELETON_MS = 150;
const BAR_PX = 12;

/** What the host's engines compute on: its first card, or its processor. */
function deviceOf({ device_kind: kind, devices }) {
  const cards = devices.gpus ?? [];
  if (kind === 'cuda' && cards.length) return cards[0].name ?? 'GPU';
  return devices.cpu?.name ?? kind ?? 'not known';
}

function aboutHost({ devices, memory_bytes: bytes }) {
  const cores = devices.cpu?.count && `${int(devices.cpu.count)} cores`;
  return [cores, `${gb(bytes)} GB`].filter(Boolean).join(' · ');
}

/** Memory for jobs, and what of it is taken: `available` is measured, `promised` are plans. */
function memoryOf({ available_bytes: available, free_bytes: free, is_alive: isAlive }) {
  if (available === null || !isAlive) return { available, promised: null, free: null };
  return { available, promised: available - free, free };
}

function sayMemory({ available, promised, free }) {
  if (available === null) return 'memory for jobs not measured';
  const use = promised === null ? 'use not known' : `${gb(promised)} GB promised, ${gb(free)} GB free`;
  return `${gb(available)} GB for jobs, ${use}`;
}

function HostMemory({ host }) {
  const memory = memoryOf(host);
  const { available, promised, free } = memory;
  const known = promised !== null;
  const width = `${known && available ? (100 * promised) / available : 0}%`;
  const name = sayMemory(memory);
  return html`
    <td class="w-mem">
      <span class="mem ${known ? '' : 'unknown'}" style=${{ '--h': `${BAR_PX}px` }} role="img" aria-label=${name}
        title=${name}>
        <span class="track"></span>
        ${known && html`<span class="seg-row" style=${{ width }}><i class="promised all"></i></span>`}
        ${available !== null && html`<span class="lim end"></span>`}
      </span>
      <span class="row between xs muted under">
        ${known && html`<span><b>${gb(promised)}</b> promised, <b>${gb(free)}</b> free</span>`}
        ${!known && html`<span>${available === null ? 'not measured: jobs without a plan only' : 'not known'}</span>`}
        ${available !== null && html`<span>of ${gb(available)} GB</span>`}
      </span>
    </td>`;
}

function Now({ host, names }) {
  const others = host.num_running - host.running_jobs.length;
  const links = host.running_jobs.map(
    id => html`<a class="cell ell strong" href="#/job/${id}" key=${id}>${visible(names.get(id) ?? id)}</a>`,
  );
  return html`
    <td class="w-now">
      ${!host.is_alive && html`<span class="warn row"><${Icon} name="warn" />not answering</span>`}
      ${links}
      ${others > 0 && html`
        <span class="cell muted">${links.length ? 'and ' : ''}${int(others)} of other organizations</span>`}
      ${host.is_alive && host.num_running === 0 && html`<span class="muted">idle</span>`}
    </td>`;
}

function Seen({ host, now }) {
  const ago = `${duration(now - host.last_seen_at)} ago`;
  const text = host.is_alive ? 'alive' : `last seen ${ago}`;
  return html`
    <td class="w-seen ${host.is_alive ? 'muted' : 'warn'}">
      <time title="Last seen ${fullTime(host.last_seen_at)}">${text}</time>
    </td>`;
}

const Row = ({ host, names, now }) => html`
  <tr>
    <td class="w-host">
      <b class="cell ell" title=${host.name}>${visible(host.name)}</b>
      <span class="cell xs faint">${aboutHost(host)}</span>
    </td>
    <td class="w-device">
      <span class="cell ell" title=${deviceOf(host)}>${visible(deviceOf(host))}</span>
      <span class="cell xs faint mono">${host.device_kind ?? MISSING}</span>
    </td>
    <${Now} host=${host} names=${names} />
    <${HostMemory} host=${host} />
    <td class="w-slots num"><span class="only-s muted">jobs </span>${int(host.num_running)} of ${int(host.slots)}</td>
    <${Seen} host=${host} now=${now} />
  </tr>`;

const Table = ({ hosts, names, now }) => html`
  <section class="card">
    <header>
      <h2 class="grow">Devices</h2>
      <div class="legend">
        <span><i class="sw promised"></i>promised to running jobs</span>
        <span><i class="sw free"></i>free</span>
      </div>
    </header>
    <table class="hosts">
      <thead>
        <tr>
          <th class="w-host">Host</th><th class="w-device">Device</th><th class="w-now">Now</th>
          <th class="w-mem">Memory for jobs</th><th class="w-slots num">Jobs</th><th class="w-seen">Worker</th>
        </tr>
      </thead>
      <tbody>${hosts.map(host => html`<${Row} key=${host.name} host=${host} names=${names} now=${now} />`)}</tbody>
    </table>
  </section>`;

const START_A_HOST = [
  ['local', 'On this machine', 'lomo up'],
  ['compose', 'Compose', 'docker compose up -d worker        # or, with NVIDIA cards: docker compose --profile gpu up -d'],
];

const Empty = () => html`
  <div class="card">
    <div class="empty">
      <h2>No worker host yet</h2>
      <p class="muted">A host appears here when its worker starts. Until then jobs wait in the queue.</p>
      <${Commands} label="command that starts a worker" forms=${START_A_HOST} />
    </div>
  </div>`;

const Unreadable = ({ error, retry }) => html`
  <div class="card">
    <div class="empty">
      <h2>The hosts could not be read</h2>
      <p class="muted">${sayError(error)}</p>
      <button class="btn primary" onClick=${retry}>Try again</button>
    </div>
  </div>`;

function summary(hosts) {
  const count = test => hosts.filter(test).length;
  const silent = count(host => !host.is_alive);
  const parts = [
    `${int(hosts.length)} ${hosts.length === 1 ? 'host' : 'hosts'}`,
    `${int(count(host => host.num_running > 0))} busy`,
    silent > 0 && `${int(silent)} not answering`,
  ];
  return parts.filter(Boolean).join(', ');
}

function Body({ state, retry, late, now }) {
  const { hosts, names, error } = state;
  if (hosts === null && error) return html`<${Unreadable} error=${error} retry=${retry} />`;
  if (hosts === null) {
    return late && html`<div class="card" aria-busy="true"><div class="empty muted">Reading the hosts</div></div>`;
  }
  if (!hosts.length) return html`<${Empty} />`;
  return html`<${Table} hosts=${hosts} names=${names} now=${now} />`;
}

export function HostsPage() {
  const feed = useMemo(() => new HostsFeed(), []);
  const state = feed.state.use();
  const now = useNow(AGES_MS);
  const late = useAfter(SKELETON_MS);
  useEffect(() => {
    document.title = 'Hosts · LOMO';
    feed.start();
    return () => feed.stop();
  }, [feed]);
  return html`
    <div class="pagehead">
      <h1 class="grow">Hosts</h1>
      ${state.hosts?.length > 0 && html`<span class="small muted">${summary(state.hosts)}</span>`}
    </div>
    <${Body} state=${state} retry=${() => feed.retry()} late=${late} now=${now} />`;
}
