// Addresses: everything lies behind '#', so the server has one page to serve. #/jobs?status=running&sort=-loss&q=text
// and #/job/<id>/<tab>?zoom=100-250. Reader's choices replace the entry, pages push one: Back leads to the page before.
import { Store } from './store.js';

function decode(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part; // a broken escape names nothing that exists: the page says so
  }
}

export function parse(hash) {
  const [path, query = ''] = hash.replace(/^#\/?/, '').split('?');
  const [page, id, tab] = path.split('/').map(decode);
  return { page: page || 'jobs', id, tab, query: new URLSearchParams(query) };
}

export const route = new Store(parse(location.hash));

addEventListener('hashchange', () => {
  const before = route.get();
  const next = parse(location.hash);
  route.set(next);
  if (before.page !== next.page || before.id !== next.id) scrollTo(0, 0);
});

/** Put the page's own choices into the address without a new entry in the history; empty ones are left out. */
export function replaceRoute({ page, id, tab, query }) {
  const pairs = new URLSearchParams([...query].filter(([, value]) => value));
  const path = [page, id, tab].filter(Boolean).map(encodeURIComponent).join('/');
  history.replaceState(null, '', `#/${path}${pairs.size ? `?${pairs}` : ''}`);
  route.set(parse(location.hash));
}

export function setQuery(changes) {
  const current = route.get();
  const query = new URLSearchParams(current.query);
  for (const [key, value] of Object.entries(changes)) query.set(key, value ?? '');
  replaceRoute({ ...current, query });
}
