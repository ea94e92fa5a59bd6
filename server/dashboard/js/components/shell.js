// The frame of every page: header with the live mark, the banner at the bottom edge, the skip link.
import { html } from '../../vendor/htm-preact-3.1.1.module.js';
import { contact } from '../contact.js';
import { clock, duration, fullTime, sayError } from '../format.js';
import { useNow } from '../hooks.js';
import { flipTheme, theme } from '../theme.js';
import { Icon, Logo } from './icons.js';

const MARKS = { connecting: 'Connecting', live: 'Live', stale: 'Stale', ended: 'Final', none: '' };

const NAV = [
  ['jobs', 'Jobs'],
  ['hosts', 'Hosts'],
];

/** `page` where the link leads to this very page, `true` where it leads to the list that the page belongs to. */
function currentMark(key, page) {
  if (key === page) return 'page';
  return key === 'jobs' && page === 'job' ? 'true' : undefined;
}

function LiveMark() {
  const { state, lastAt } = contact.use();
  const ended = 'This job is over: nothing changes any more';
  const title = state === 'ended' ? ended : `Last message ${fullTime(lastAt / 1000)}`;
  return html`<span class="live ${state}" role="status" title=${title}><i></i>${MARKS[state]}</span>`;
}

function ThemeButton() {
  const current = theme.use();
  const other = current === 'dark' ? 'light' : 'dark';
  return html`
    <button class="btn quiet" onClick=${flipTheme} aria-label="Switch to ${other} theme">
      <${Icon} name=${current === 'dark' ? 'sun' : 'moon'} />
    </button>`;
}

/** While there is no contact: since when, what that means, when the next try is. */
function StaleBanner() {
  const { state, lastAt, nextTryAt, error, retry } = contact.use();
  const now = useNow(1_000);
  if (state !== 'stale') return null;
  const seen = lastAt / 1000;
  const wait = nextTryAt === null ? null : Math.max(0, nextTryAt / 1000 - now);
  const sentences = [
    `No contact for ${duration(now - seen)}.`,
    `What you see is from ${clock(seen)} UTC. Jobs go on without this page.`,
    error && `The last answer was: ${sayError(error)}.`,
    wait === null ? 'Trying now.' : `Next try in ${duration(wait)}.`,
  ];
  return html`
    <div class="banner" role="alert">
      <${Icon} name="warn" />
      <span class="grow">${sentences.filter(Boolean).join(' ')}</span>
      <button class="btn s" onClick=${() => retry?.()}>Try now</button>
    </div>`;
}

function skip(event) {
  event.preventDefault(); // the fragment of the address is the page's route
  document.getElementById('main').focus();
}

export function Shell({ page, children }) {
  const { state } = contact.use();
  return html`
    <div class=${state === 'stale' ? 'stalepage' : ''}>
      <a class="sr skip" href="#main" onClick=${skip}>Skip to content</a>
      <header class="top">
        <a class="brand" href="#/jobs" aria-label="LOMO, jobs"><${Logo} /><span>LOMO</span></a>
        <nav class="nav" aria-label="Main">
          ${NAV.map(([key, title]) => html`<a href="#/${key}" aria-current=${currentMark(key, page)}>${title}</a>`)}
        </nav>
        <span class="grow"></span>
        <${LiveMark} />
        <${ThemeButton} />
        <form method="post" action="/logout"><button class="btn quiet">Sign out</button></form>
      </header>
      <main id="main" tabindex="-1">${children}</main>
      <${StaleBanner} />
    </div>`;
}
