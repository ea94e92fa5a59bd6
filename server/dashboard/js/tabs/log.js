// The live tail of everything a job says. Follow stops when the reader scrolls up and says how many lines are new.
// Text nodes only: what a log holds is never read as markup.
import { Component, html, useEffect, useLayoutEffect, useRef, useState } from '../../vendor/htm-preact-3.1.1.module.js';
import { clockSeconds, int, visible } from '../format.js';
import { Segments } from '../components/basics.js';
import { Icon } from '../components/icons.js';

// More lines in the page than these make each new one slow to lay out (about 4 ms per thousand rows).
const MOST_LINES = 1_000;
const AT_END_PX = 24;
const LEVELS = [
  ['all', 'All'],
  ['info', 'Info'],
  ['warn', 'Warn'],
  ['error', 'Error'],
];

/** The text with each hit of the search marked. */
function marked(text, search) {
  if (!search) return text;
  const parts = [];
  const lower = text.toLowerCase();
  let from = 0;
  for (let at = lower.indexOf(search); at >= 0; at = lower.indexOf(search, from)) {
    parts.push(text.slice(from, at), html`<mark>${text.slice(at, at + search.length)}</mark>`);
    from = at + search.length;
  }
  return [...parts, text.slice(from)];
}

/** A line is laid out once: a log of a thousand that grows by one renders one. */
class Line extends Component {
  shouldComponentUpdate({ event, search }) {
    return event !== this.props.event || search !== this.props.search;
  }

  render({ event, search }) {
    return html`
      <li class=${event.level}>
        <span class="ln faint right">${event.seq}</span>
        <span class="faint">${clockSeconds(event.created_at)}</span>
        <span class="lv">${event.level}</span>
        <span>${marked(visible(event.message), search)}</span>
      </li>`;
  }
}

export function Log({ state, older }) {
  const [text, setText] = useState('');
  const [level, setLevel] = useState('all');
  const [follow, setFollow] = useState(true);
  const box = useRef();
  const seen = useRef(0);
  const search = text.toLowerCase();
  const fits = event =>
    (level === 'all' || event.level === level) && (!search || visible(event.message).toLowerCase().includes(search));
  const rows = state.events.filter(fits);
  const shown = rows.slice(-MOST_LINES);
  const newest = state.events.length ? state.events[state.events.length - 1].seq : 0;
  if (follow) seen.current = newest;
  const unseen = rows.filter(event => event.seq > seen.current).length;

  useLayoutEffect(() => {
    if (follow) box.current.scrollTop = box.current.scrollHeight;
  });
  useEffect(() => {
    const element = box.current;
    const look = () => setFollow(element.scrollHeight - element.scrollTop - element.clientHeight < AT_END_PX);
    element.addEventListener('scroll', look, { passive: true });
    return () => element.removeEventListener('scroll', look);
  }, []);

  const onSearch = event => setText(event.target.value);
  const onFollow = event => setFollow(event.target.checked);
  return html`
    <div class="row wrap logtools">
      <label class="search">
        <${Icon} name="search" />
        <input class="inp" placeholder="Search the log" aria-label="Search the log" value=${text} onInput=${onSearch} />
      </label>
      <${Segments} label="Level" current=${level} pick=${setLevel} items=${LEVELS} />
      <span class="small muted">${int(shown.length)} of ${int(state.events.length)} lines</span>
      ${state.hasOlder && html`<button class="btn s" onClick=${older}>Read older lines</button>`}
      <span class="grow"></span>
      ${unseen > 0 && html`<button class="btn s" onClick=${() => setFollow(true)}>${int(unseen)} new</button>`}
      <label class="row small"><input type="checkbox" checked=${follow} onChange=${onFollow} />Follow</label>
    </div>
    <ol class="log" ref=${box} tabindex="0" aria-label="Log lines">
      ${shown.map(event => html`<${Line} key=${event.seq} event=${event} search=${search} />`)}
    </ol>`;
}
