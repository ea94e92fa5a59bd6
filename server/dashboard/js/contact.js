// What the whole page knows about its connection: written by the feed of the page, shown by the header and the banner.
import { Store } from './store.js';

/** `state`: connecting, live, stale, ended or none (nothing is followed); `error`: the last ApiError of a lost connection; `retry()`: try now. */
export const contact = new Store({
  state: 'connecting',
  lastAt: Date.now(),
  nextTryAt: null,
  error: null,
  retry: null,
});

export const setContact = change => contact.set({ ...contact.get(), ...change });
