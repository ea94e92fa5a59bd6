// One job: its row, its history, its events. History is read once, then the event stream continues after the newest
// event that was read; what comes twice replaces itself. Published at most once a second.
import { getJson, jobPath, postJson } from './api.js';
import { setContact } from './contact.js';
import { jobView } from './jobview.js';
import { isStep, Series } from './series.js';
import { Stream } from './sse.js';
import { Store } from './store.js';

const PUBLISH_MS = 1_000;
const ROW_MS = 2_000; // how often the row is read again while steps come in
const MAX_POINTS = 1_000;
const READ_AGAIN = 4 * MAX_POINTS; // at so many points the history is read again, thinned by the server
const MOST_EVENTS = 6_000; // the oldest are let go; the tabs can read them again
const EVENTS_PAGE = 1_000; // the most that the API gives at once; older ones on demand
const EMPTY = {
  job: null,
  columns: null,
  evaluations: [],
  events: [],
  checkpoints: [],
  attempts: [],
  hasOlder: false,
  error: null,
};

export class JobFeed {
  state = new Store(EMPTY);
  #series = new Series();
  #events = new Map();
  #seq = 0;
  #thinned = false;
  #reading = false;
  #rowAt = 0;
  #rowPending = null;
  #publishing = null;
  #stream = null;
  #stopped = false;

  constructor(id) {
    this.id = id;
    this.path = jobPath(id);
  }

  async start() {
    setContact({ state: 'connecting', error: null, nextTryAt: null, lastAt: Date.now(), retry: () => this.retry() });
    try {
      const [job] = await Promise.all([getJson(this.path), this.#readEvents(), this.#readCheckpoints()]);
      await this.#readHistory();
      if (this.#stopped) return;
      this.#publish({ job: jobView(job), error: null });
      this.#follow();
    } catch (error) {
      if (this.#stopped) return;
      setContact({ state: 'none' });
      this.#publish({ error });
    }
  }

  stop() {
    this.#stopped = true;
    this.#stream?.close();
    clearTimeout(this.#publishing);
    clearTimeout(this.#rowPending);
  }

  retry() {
    if (this.#stream) this.#stream.tryNow();
    else this.start();
  }

  /** Ask for the job's end. Throws ApiError with the reason where that is not possible. */
  async cancel() {
    this.#publish({ job: jobView(await postJson(`${this.path}/cancel`)) });
  }

  /** Ask for the job's pause. Throws as `cancel`. */
  async pause() {
    this.#publish({ job: jobView(await postJson(`${this.path}/pause`)) });
  }

  /** Let a paused job go on. Throws as `cancel`. */
  async resume() {
    this.#publish({ job: jobView(await postJson(`${this.path}/resume`)) });
  }

  /** Add older events to the tabs. */
  async older() {
    try {
      await this.#readEvents();
      this.#publish({});
    } catch (error) {
      setContact({ error });
    }
  }

  /** Read a window of a thinned history in full detail, for a zoom. */
  async refine(first, last) {
    if (!this.#thinned) return;
    const [from, to] = [Math.max(0, Math.floor(first)), Math.ceil(last)];
    this.#series.load(
      await getJson(`${this.path}/metrics?max_points=${MAX_POINTS}&first_step=${from}&last_step=${to}`),
      [from, to],
    );
    this.#publish({});
  }

  async #readHistory() {
    this.#reading = true;
    try {
      const answer = await getJson(`${this.path}/metrics?max_points=${MAX_POINTS}`);
      this.#thinned = answer.columns.step.length >= MAX_POINTS;
      this.#series.load(answer);
      this.state.set({ ...this.state.get(), attempts: answer.attempts ?? [] });
    } finally {
      this.#reading = false;
    }
  }

  async #readEvents() {
    const oldest = Math.min(...this.#events.keys());
    const after = this.#events.size ? `&after=${encodeURIComponent(this.#events.get(oldest).id)}` : '';
    const answer = await getJson(`${this.path}/events?limit=${EVENTS_PAGE}${after}`);
    for (const event of answer.data) this.#take(event);
    this.state.set({ ...this.state.get(), hasOlder: answer.has_more });
  }

  async #readCheckpoints() {
    const answer = await getJson(`${this.path}/checkpoints?limit=${EVENTS_PAGE}`);
    this.state.set({ ...this.state.get(), checkpoints: answer.data });
  }

  #follow() {
    const onEvent = event => this.#onEvent(event);
    this.#stream = new Stream({
      url: () => `${this.path}/events?stream=true&pings=true&after=${this.#seq}`,
      handlers: {
        metrics: onEvent,
        status: onEvent,
        // The last frame has no name, and so arrives as a message without data.
        message: event => (event === null ? this.#end() : onEvent(event)),
      },
      onState: state => setContact(state),
      onFailure: () => this.#readRow(),
    });
  }

  #onEvent(event) {
    this.#take(event);
    const data = event.data ?? {};
    if (isStep(event)) this.#series.step(data, { attempt: event.attempt, time: event.created_at });
    else if (event.type === 'metrics' && 'num_rows' in data)
      this.#series.evaluation({ created_at: event.created_at, ...data });
    else if ('manifest_sha256' in data) this.#readCheckpoints().catch(error => setContact({ error }));
    if (this.#series.numSteps > READ_AGAIN && !this.#reading) this.#readHistory().catch(error => setContact({ error }));
    this.#soonReadRow(data.status ? 0 : ROW_MS);
    this.#publishing ??= setTimeout(() => this.#publish({}), PUBLISH_MS);
  }

  #take(event) {
    this.#events.set(event.seq, event);
    this.#seq = Math.max(this.#seq, event.seq);
  }

  #soonReadRow(wait) {
    if (wait === 0) clearTimeout(this.#rowPending);
    else if (this.#rowPending !== null) return;
    this.#rowPending = setTimeout(() => this.#readRow(), Math.max(0, this.#rowAt + wait - Date.now()));
  }

  async #readRow() {
    this.#rowPending = null;
    this.#rowAt = Date.now();
    try {
      const job = jobView(await getJson(this.path));
      if (!this.#stopped) this.#publish({ job, error: null });
      setContact({ error: null });
    } catch (error) {
      setContact({ error });
    }
  }

  async #end() {
    this.#stream.close({ ended: true });
    await this.#readRow();
  }

  #publish(change) {
    clearTimeout(this.#publishing);
    this.#publishing = null;
    const events = [...this.#events.values()].sort((a, b) => a.seq - b.seq);
    for (const event of events.splice(0, Math.max(0, events.length - MOST_EVENTS))) this.#events.delete(event.seq);
    const columns = this.#series.columns();
    const evaluations = this.#series.evaluations;
    this.state.set({ ...this.state.get(), columns, evaluations, events, ...change });
  }
}
