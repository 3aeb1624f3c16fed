/* A folder that is dropped becomes one zip (stored, not packed), here in the browser: the server takes files, no folders. */
(() => {
  "use strict";
  const MOST_FILES = 20000, MOST_BYTES = 2 ** 30;
  const TABLE = Uint32Array.from({ length: 256 }, (_, n) => {
    for (let k = 0; k < 8; k++) n = n & 1 ? 0xEDB88320 ^ (n >>> 1) : n >>> 1;
    return n >>> 0;
  });

  async function filesOf(entry, path = "") {
    if (entry.isFile) return [[path + entry.name, await new Promise((good, bad) => entry.file(good, bad))]];
    const reader = entry.createReader(), found = [];
    for (let some; (some = await new Promise((good, bad) => reader.readEntries(good, bad))).length;)
      for (const one of some) found.push(...await filesOf(one, `${path}${entry.name}/`));
    return found;
  }

  async function zipped(files) {
    const parts = [], index = [];
    let at = 0, size = 0;
    for (const [name, file] of files) {
      const data = new Uint8Array(await file.arrayBuffer()), label = new TextEncoder().encode(name.replaceAll(":", "_"));
      let crc = 0xFFFFFFFF;
      for (const byte of data) crc = TABLE[(crc ^ byte) & 255] ^ (crc >>> 8);
      // From the version needed to the length of the extra field: the same in both records.
      const shared = new DataView(new ArrayBuffer(26));
      shared.setUint16(0, 20, true); shared.setUint16(2, 0x800, true); shared.setUint16(8, 33, true);
      shared.setUint32(10, (crc ^ 0xFFFFFFFF) >>> 0, true);
      shared.setUint32(14, data.length, true); shared.setUint32(18, data.length, true); shared.setUint16(22, label.length, true);
      const rest = new DataView(new ArrayBuffer(14));
      rest.setUint32(10, at, true);
      parts.push(Uint8Array.of(80, 75, 3, 4), shared, label, data);
      index.push(Uint8Array.of(80, 75, 1, 2, 20, 0), shared, rest, label);
      at += 30 + label.length + data.length;
      size += 46 + label.length;
    }
    const tail = new DataView(new ArrayBuffer(22));
    tail.setUint32(0, 0x06054B50, true);
    tail.setUint16(8, files.length, true); tail.setUint16(10, files.length, true);
    tail.setUint32(12, size, true); tail.setUint32(16, at, true);
    return new File([...parts, ...index, tail], "folder.zip", { type: "application/zip" });
  }

  async function give(files) {
    const input = document.querySelector("#omni-upload input[type=file]");
    const bytes = files.reduce((sum, [, file]) => sum + file.size, 0);
    if (!input || !files.length) return;
    if (files.length > MOST_FILES || bytes > MOST_BYTES) {
      window.alert(`Expected at most ${MOST_FILES} files and 1 GB, got ${files.length} files of ${(bytes / 2 ** 30).toFixed(1)} GB; drop one study.`);
      return;
    }
    const held = new DataTransfer();
    held.items.add(await zipped(files));
    input.files = held.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  }

  document.addEventListener("drop", async (event) => {
    const entries = [...(event.dataTransfer ? event.dataTransfer.items : [])].map((one) => one.webkitGetAsEntry && one.webkitGetAsEntry());
    if (!event.target.closest || !event.target.closest("#omni-upload") || !entries.some((one) => one && one.isDirectory)) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    await give((await Promise.all(entries.filter(Boolean).map((one) => filesOf(one)))).flat());
  }, true);

  window.omnimriFolder = { give };
})();
