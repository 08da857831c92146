// The dialogs in this browser's IndexedDB. They are sent nowhere but to the model.

const NAME = "chasqui";
const STORE = "dialogs";

let database = null;

/** All dialogs, the latest first; null if the browser keeps none, and they end with the page. */
export async function load() {
  try {
    const opening = indexedDB.open(NAME, 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore(STORE, { keyPath: "id" });
    database = await result(opening);
    const found = await result(store("readonly").getAll());
    return found.sort((a, b) => b.updated - a.updated);
  } catch {
    return null;
  }
}

export async function save(dialog) {
  if (database) await result(store("readwrite").put(dialog));
}

export async function remove(dialog) {
  if (database) await result(store("readwrite").delete(dialog.id));
}

function store(mode) {
  return database.transaction(STORE, mode).objectStore(STORE);
}

function result(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
