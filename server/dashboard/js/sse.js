// One server-sent event stream with its own clock: live, stale after ten seconds of silence, next try known. The
// browser's own reconnecting gives up on an HTTP error and tells no time, so every error closes and reopens here.

const STALE_MS = 10_000; // two of the server's pings (every 5 s) have been missed
const DEAD_MS = 20_000; // an open connection that says nothing for so long is a dead one
const FIRST_WAIT_MS = 1_000;
const LONGEST_WAIT_MS = 15_000;

export class Stream {
  #source = null;
  #timer = null;
  #retry = null;
  #wait = FIRST_WAIT_MS;
  #state = { state: 'connecting', lastAt: Date.now(), nextTryAt: null };

  /**
   * `url()` is asked at each (re)connection, so that it can name the last event seen. `handlers` maps event names to
   * functions of the parsed data. `onState` gets `{state, lastAt, nextTryAt}`; `onFailure` runs after each lost
   * connection and may find out why (EventSource does not tell).
   */
  constructor({ url, handlers, onState, onFailure }) {
    Object.assign(this, { url, handlers, onState, onFailure });
    this.#timer = setInterval(() => this.#look(), 1_000);
    this.#open();
  }

  /** End for good: the page is left, or the server said that nothing more comes. */
  close({ ended = false } = {}) {
    clearInterval(this.#timer);
    clearTimeout(this.#retry);
    this.#source?.close();
    this.#source = null;
    if (ended) this.#set({ state: 'ended', nextTryAt: null });
  }

  tryNow() {
    clearTimeout(this.#retry);
    this.#open();
  }

  #open() {
    this.#source?.close();
    const source = (this.#source = new EventSource(this.url()));
    source.onopen = () => this.#heard();
    source.onerror = () => source === this.#source && this.#lost();
    for (const [name, handler] of Object.entries({ ping: () => {}, ...this.handlers })) {
      source.addEventListener(name, event => {
        if (source !== this.#source) return;
        this.#heard();
        handler(event.data === '[DONE]' ? null : JSON.parse(event.data), event);
      });
    }
    this.#set({ nextTryAt: null });
  }

  #heard() {
    this.#wait = FIRST_WAIT_MS;
    this.#set({ state: 'live', lastAt: Date.now(), nextTryAt: null });
  }

  #lost() {
    this.#source?.close();
    this.#source = null;
    clearTimeout(this.#retry);
    // Up to a quarter more at random: after a restart of the server not every page comes back in the same moment.
    const wait = this.#wait * (1 + Math.random() / 4);
    this.#wait = Math.min(2 * this.#wait, LONGEST_WAIT_MS);
    this.#set({ nextTryAt: Date.now() + wait });
    this.#retry = setTimeout(() => this.#open(), wait);
    this.onFailure?.();
  }

  #look() {
    const silent = Date.now() - this.#state.lastAt;
    if (silent > STALE_MS && this.#state.state !== 'stale') this.#set({ state: 'stale' });
    if (silent > DEAD_MS && this.#source?.readyState === EventSource.OPEN) this.#lost();
  }

  #set(change) {
    this.#state = { ...this.#state, ...change };
    this.onState?.(this.#state);
  }
}
