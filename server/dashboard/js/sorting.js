// Orders of the jobs list. A sort is a column's name, with a minus for descending: `-loss`.
import { STATUSES } from './jobview.js';

export const NEWEST_FIRST = 'age';

const STATUS_ORDER = Object.keys(STATUSES);
const KEYS = {
  status: view => STATUS_ORDER.indexOf(view.status),
  name: view => view.name.toLowerCase(),
  base: view => view.base.toLowerCase(),
  progress: view => -view.share,
  loss: view => view.loss ?? Infinity,
  memory: view => view.peak ?? view.plannedPeak ?? 0,
  device: view => view.host ?? '\uffff',
  age: view => -view.createdAt,
};

export const sortColumn = sort => sort.replace(/^-/, '');

export const isDescending = sort => sort.startsWith('-');

/** The sort after a click on a column's head. */
export const clicked = (sort, column) => (sort === column ? `-${column}` : column);

/** A sorted copy; jobs that are equal stay newest first. */
export function ordered(views, sort) {
  const key = KEYS[sortColumn(sort)] ?? KEYS.age;
  const sign = isDescending(sort) ? -1 : 1;
  return [...views].sort((a, b) => {
    const [x, y] = [key(a), key(b)];
    return x === y ? 0 : x > y ? sign : -sign;
  });
}
