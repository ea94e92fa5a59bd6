// A value that components can follow: `use()` renders the component again on each change.
import { useState, useLayoutEffect } from '../vendor/htm-preact-3.1.1.module.js';

export class Store {
  #value;
  #followers = new Set();

  constructor(value) {
    this.#value = value;
  }

  get() {
    return this.#value;
  }

  set(value) {
    if (Object.is(value, this.#value)) return;
    this.#value = value;
    for (const follower of [...this.#followers]) follower(value);
  }

  /** Call `follower` on each change; returns a function that ends it. */
  subscribe(follower) {
    this.#followers.add(follower);
    return () => this.#followers.delete(follower);
  }

  /** Hook: the value, followed. */
  use() {
    const [value, setValue] = useState(() => this.#value);
    useLayoutEffect(() => {
      setValue(() => this.#value); // it may have changed between render and effect
      return this.subscribe(next => setValue(() => next));
    }, [this]);
    return value;
  }
}
