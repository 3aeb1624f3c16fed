/* The viewer: NiiVue, driven by the page through window.omnimri.show(scene). No request leaves this origin. */
(() => {
  "use strict";
  const { Niivue, SLICE_TYPE, DRAG_MODE } = window.niivue;
  const PLANES = { 1: ["Axial", SLICE_TYPE.AXIAL], 2: ["Coronal", SLICE_TYPE.CORONAL], 3: ["Sagittal", SLICE_TYPE.SAGITTAL] };
  const view = { scene: null, nv: null, other: null, radiological: true, overlay: true, opacity: 0.5, hidden: new Set(), alpha: new Map(), picked: null, tool: "cross",
    lit: null };
  const at = {};

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
      else if (value !== false && value !== null) made.setAttribute(key, value === true ? "" : value);
    }
    made.append(...children);
    return made;
  }

  function button(text, title, act, pressed = null) {
    return element("button", { type: "button", title, onclick: act, "aria-pressed": pressed === null ? null : String(pressed) }, text);
  }

  function layout(type, name) {
    view.nv.setSliceType(type);
    if (view.other) view.other.setSliceType(type);
    view.layout = name;
    // In 3-D the masks alone: the head around them would dim what lies deep.
    if (view.nv.volumes.length > 1) view.nv.setOpacity(0, name === "render" ? 0 : 1);
    for (const [key, made] of Object.entries(at.layouts)) made.setAttribute("aria-pressed", String(key === name));
  }

  function tool(name) {
    view.tool = name;
    const modes = { cross: DRAG_MODE.windowing, window: DRAG_MODE.windowing, pan: DRAG_MODE.pan, distance: DRAG_MODE.measurement, region: DRAG_MODE.roiSelection };
    view.nv.opts.dragMode = modes[name];
    // Touch screens and one-button mice have no second button: the chosen tool works with the first as well.
    view.nv.opts.dragModePrimary = name === "cross" ? DRAG_MODE.crosshair : modes[name];
    for (const [key, made] of Object.entries(at.tools)) made.setAttribute("aria-pressed", String(key === name));
    at.hint.textContent = {
      cross: "Drag to move the crosshair; with the right button: window and level. Wheel: slices.",
      window: "Drag up and down for level, left and right for window.",
      pan: "Drag to move, wheel to zoom.",
      distance: "Drag to measure a distance in mm.",
      region: "Drag a box for its statistics.",
    }[name];
  }

  function convention(radiological) {
    view.radiological = radiological;
    for (const nv of [view.nv, view.other]) if (nv) nv.setRadiologicalConvention(radiological);
    at.convention.textContent = radiological ? "Radiological" : "Neurological";
    letters();
  }

  function letters() {
    const known = view.scene && view.scene.oriented;
    for (const nv of [view.nv, view.other]) if (nv) nv.setIsOrientationTextVisible(Boolean(known));
    const sides = view.radiological ? "R on the left of the image" : "L on the left of the image";
    at.sides.textContent = known ? sides : "Sides are unknown: the file gives no orientation";
  }

  function colours() {
    const labels = view.scene.overlay ? view.scene.overlay.labels : [];
    const map = { R: [0], G: [0], B: [0], A: [0], I: [0], labels: [""] };
    for (const one of labels) {
      const shown = view.overlay && !view.hidden.has(one.id);
      map.R.push(one.colour[0]); map.G.push(one.colour[1]); map.B.push(one.colour[2]);
      map.A.push(shown ? Math.round((view.lit === null || one.id === view.lit ? 255 : 40) * (view.alpha.get(one.id) ?? 1)) : 0);
      map.I.push(one.id); map.labels.push(one.name);
    }
    return map;
  }

  function paint() {
    if (!view.nv || view.nv.volumes.length < 2) return;
    view.nv.volumes[1].setColormapLabel(colours());
    view.nv.setOpacity(1, view.opacity);
    view.nv.updateGLVolume();
    at.overlay.setAttribute("aria-pressed", String(view.overlay));
  }

  function legend() {
    at.legend.replaceChildren();
    for (const one of view.scene.overlay ? view.scene.overlay.labels : []) {
      const box = element("input", { type: "checkbox", checked: !view.hidden.has(one.id), onchange: () => {
        if (box.checked) view.hidden.delete(one.id); else view.hidden.add(one.id);
        paint();
      } });
      const patch = element("span", { class: "omni-patch" });
      patch.style.background = `rgb(${one.colour.join(",")})`;
      const pick = button(one.name, "The slider then sets the opacity of this structure alone", () => pickOne(view.picked === one.id ? null : one.id),
        view.picked === one.id);
      at.legend.append(element("span", {}, element("label", {}, box, patch, element("span", { class: "omni-hidden" }, `Show ${one.name}`)), pick));
    }
  }

  function pickOne(id) {
    view.picked = id;
    at.opacity.value = id === null ? view.opacity : view.alpha.get(id) ?? 1;
    const one = id === null ? null : view.scene.overlay.labels.find((label) => label.id === id);
    at.opacity.setAttribute("aria-label", one ? `Opacity of ${one.name}` : "Opacity of the masks");
    legend();
  }

  function opacity() {
    if (view.picked === null) view.opacity = Number(at.opacity.value);
    else view.alpha.set(view.picked, Number(at.opacity.value));
    paint();
  }

  function located(place) {
    if (!view.scene || !place.mm) return;
    const [x, y, z] = place.mm;
    view.mm = [x, y, z];
    const names = view.scene.oriented ? [x < 0 ? "L" : "R", y < 0 ? "P" : "A", z < 0 ? "I" : "S"] : ["", "", ""];
    const where = [x, y, z].map((v, k) => `${Math.abs(v).toFixed(1)} ${names[k]}`.trim()).join(", ");
    const values = place.values || [];
    const label = values[1] && view.scene.overlay ? view.scene.overlay.labels.find((one) => one.id === Math.round(values[1].value)) : null;
    at.place.textContent = `${where} mm · intensity ${values[0] ? Number(values[0].value).toPrecision(4) : "–"}${label ? ` · ${label.name}` : ""}`;
  }

  function region(data) {
    if (view.tool !== "region" || !data.voxStart || !data.voxEnd) return;
    const found = view.nv.getDescriptives({ layer: 0, masks: [], roiIsMask: true, startVox: data.voxStart, endVox: data.voxEnd });
    const ml = found.volumeML === undefined ? "" : ` · ${found.volumeML.toPrecision(3)} ml`;
    at.place.textContent = `region: mean ${found.mean.toPrecision(4)} · SD ${found.stdev.toPrecision(3)} · ${found.min.toPrecision(4)} to ${found.max.toPrecision(4)} · ${found.nvox} voxels${ml}`;
    view.region = { mean: found.mean, stdev: found.stdev, voxels: found.nvox };
  }

  async function created(canvas) {
    const nv = new Niivue({ backColor: [0, 0, 0, 1], crosshairColor: [1, 0.85, 0, 0.7], show3Dcrosshair: true, isRadiologicalConvention: true,
      dragAndDropEnabled: false, multiplanarForceRender: false, isColorbar: false, loadingText: "" });
    nv.opts.crosshairWidthUnit = "mm";
    nv.opts.crosshairWidth = 0.6;
    nv.opts.showAllOrientationMarkers = true;
    nv.opts.fontColor = [1, 0.85, 0, 1];
    await nv.attachToCanvas(canvas);
    nv.setInterpolation(false);
    return nv;
  }

  async function build(root) {
    at.layouts = { all: button("3 planes", "Three linked planes (4)", () => layout(SLICE_TYPE.MULTIPLANAR, "all"), true) };
    for (const [key, [name, type]] of Object.entries(PLANES)) at.layouts[key] = button(name, `${name} (${key})`, () => layout(type, key), false);
    at.layouts.render = button("3-D", "Masks in three dimensions", () => layout(SLICE_TYPE.RENDER, "render"), false);
    at.tools = {
      cross: button("Crosshair", "Move the crosshair", () => tool("cross"), true),
      window: button("Window", "Window and level by dragging", () => tool("window"), false),
      pan: button("Pan/zoom", "Move and zoom", () => tool("pan"), false),
      distance: button("Distance", "Measure a distance", () => tool("distance"), false),
      region: button("Region", "Statistics of a box", () => tool("region"), false),
    };
    at.overlay = button("Overlay", "Masks on or off (O)", toggleOverlay, true);
    at.convention = button("Radiological", "Which side of the patient is on the left", () => convention(!view.radiological));
    at.opacity = element("input", { type: "range", min: 0, max: 1, step: 0.05, value: view.opacity, "aria-label": "Opacity of the masks",
      oninput: opacity });
    at.series = element("select", { "aria-label": "Series", onchange: () => { view.chosen = at.series.value; load(); } });
    at.compare = element("select", { "aria-label": "Compare with", onchange: () => { view.comparing = at.compare.value; load(); } });
    at.hint = element("span", { class: "omni-hint" });
    at.sides = element("span", { class: "omni-sides" });
    at.place = element("div", { class: "omni-place", role: "status" });
    at.legend = element("div", { class: "omni-legend" });
    at.canvas = element("canvas", { "aria-label": "The study" });
    at.second = element("canvas", { "aria-label": "The study compared with" });
    at.beside = element("div", { class: "omni-pane", hidden: true }, at.second);
    at.frame = element("div", { class: "omni-canvases", tabindex: 0, role: "application", "aria-label": "Viewer: arrows scroll, 1 to 3 planes, O masks, R reset" },
      element("div", { class: "omni-pane" }, at.canvas), at.beside);
    const bar = (...parts) => element("div", { class: "omni-bar", role: "toolbar" }, ...parts);
    root.replaceChildren(
      bar(...Object.values(at.layouts), at.overlay, at.opacity, at.convention, button("Reset", "Reset window, zoom and place (R)", reset)),
      bar(...Object.values(at.tools), element("label", {}, "Series ", at.series), element("label", {}, "Beside ", at.compare)),
      at.frame, bar(at.sides, at.hint), at.place, at.legend);
    view.nv = await created(at.canvas);
    view.nv.onLocationChange = located;
    view.nv.onDragRelease = region;
    at.frame.addEventListener("keydown", key);
    tool("cross");
    at.canvas.addEventListener("pointermove", hover);
  }

  function hover(event) {
    if (event.buttons || !view.nv.volumes.length || view.layout === "render") return;
    const dpr = view.nv.uiData.dpr || 1;
    const frac = view.nv.canvasPos2frac([event.offsetX * dpr, event.offsetY * dpr]);
    if (!frac || frac[0] < 0) return;
    const mm = [...view.nv.frac2mm(frac)].slice(0, 3), crosshair = view.mm;
    located({ mm, values: view.nv.volumes.map((one) => ({ value: one.getValue(...one.mm2vox(mm)) })) });
    view.mm = crosshair;
  }

  function toggleOverlay() {
    view.overlay = !view.overlay;
    paint();
  }

  function reset() {
    for (const nv of [view.nv, view.other]) {
      if (!nv || !nv.volumes.length) continue;
      nv.setPan2Dxyzmm([0, 0, 0, 1]);
      nv.volumes[0].cal_min = nv.volumes[0].robust_min;
      nv.volumes[0].cal_max = nv.volumes[0].robust_max;
      nv.updateGLVolume();
    }
    if (view.scene && view.scene.home) goTo(view.scene.home);
  }

  function key(event) {
    if (!view.scene || event.ctrlKey || event.metaKey || event.altKey) return;
    const steps = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1 };
    if (event.key in steps) {
      const axis = { 1: 2, 2: 1, 3: 0 }[view.layout] ?? 2;
      const to = [...(view.mm || [0, 0, 0])];
      to[axis] += steps[event.key] * (view.scene.step_mm ? view.scene.step_mm[axis] : 1);
      goTo(to);
    } else if (event.key in PLANES) layout(PLANES[event.key][1], event.key);
    else if (event.key === "4") layout(SLICE_TYPE.MULTIPLANAR, "all");
    else if (event.key === "o" || event.key === "O") toggleOverlay();
    else if (event.key === "r" || event.key === "R") reset();
    else return;
    event.preventDefault();
  }

  function goTo(mm) {
    if (!view.nv.volumes.length) return;
    view.nv.scene.crosshairPos = view.nv.mm2frac(mm);
    view.nv.createOnLocationChange();
    view.nv.drawScene();
    if (view.other) { view.other.scene.crosshairPos = view.other.mm2frac(mm); view.other.drawScene(); }
  }

  async function finding(number) {
    const found = (view.scene ? view.scene.findings : []).find((one) => one.number === number);
    if (!found || !view.nv || !view.nv.volumes.length) return;
    const of = view.scene.overlay && view.scene.overlay.of;
    if (of && view.chosen && view.chosen !== of) {
      view.chosen = at.series.value = of;
      await load();
    }
    goTo(found.mm);
    view.overlay = true;
    view.hidden.delete(found.label);
    view.alpha.delete(found.label);
    view.lit = found.label;
    legend();
    paint();
    clearTimeout(view.dim);
    view.dim = setTimeout(() => { view.lit = null; paint(); }, 2500);
    at.frame.focus({ preventScroll: true });
  }

  function options(select, list, chosen, none) {
    select.replaceChildren();
    if (none) select.append(element("option", { value: "" }, none));
    for (const one of list) select.append(element("option", { value: one.name, selected: one.name === chosen }, one.name));
  }

  async function load(keep = null, range = null) {
    const { scene, nv } = view;
    const main = scene.volumes.find((one) => one.name === view.chosen) || scene.volumes[0];
    const wanted = main ? [{ url: main.url, name: "volume.nii", colormap: "gray" }] : [];
    if (main && scene.overlay && main.name === scene.overlay.of) wanted.push({ url: scene.overlay.url, name: "mask.nii", opacity: view.opacity });
    await nv.loadVolumes(wanted);
    if (range && nv.volumes[0]) {
      [nv.volumes[0].cal_min, nv.volumes[0].cal_max] = range;
      nv.updateGLVolume();
    }
    if (wanted.length > 1) paint();
    const beside = scene.volumes.find((one) => one.name === view.comparing);
    at.beside.hidden = !beside;
    if (beside) {
      if (!view.other) {
        view.other = await created(at.second);
        const step = { "2d": true, "3d": true, cal_min: Boolean(scene.compare), cal_max: Boolean(scene.compare) };
        view.nv.broadcastTo([view.other], step);
        view.other.broadcastTo([view.nv], step);
      }
      await view.other.loadVolumes([{ url: beside.url, name: "beside.nii", colormap: "gray" }]);
    }
    convention(view.radiological);
    legend();
    nv.resizeListener();
    if (view.other) view.other.resizeListener();
    if (keep || scene.home) goTo(keep || scene.home);
    view.loaded = scene.revision;
  }

  let queue = Promise.resolve();
  async function show(scene) {
    queue = queue.then(async () => {
      const root = document.getElementById("omni-viewer");
      if (!root) return;
      if (!view.nv || !root.contains(at.canvas)) { view.other = null; await build(root); }
      if (!scene || !scene.volumes) { view.scene = null; view.nv.loadVolumes([]); at.place.textContent = ""; at.legend.replaceChildren(); return; }
      const same = view.scene && view.scene.study === scene.study;
      // A decision or an answer moves neither the crosshair nor the window.
      const keep = same && view.mm ? [...view.mm] : null, old = view.nv.volumes[0];
      const range = keep && old ? [old.cal_min, old.cal_max] : null;
      view.scene = scene;
      if (!same) { view.chosen = null; view.comparing = ""; view.hidden = new Set(); view.alpha = new Map(); view.picked = null; }
      if (scene.compare) view.comparing = scene.compare;
      const there = scene.overlay && scene.overlay.labels.some((one) => one.id === view.picked);
      pickOne(there ? view.picked : null);
      options(at.series, scene.volumes, view.chosen || scene.volumes[0].name);
      options(at.compare, scene.volumes, view.comparing, "nothing");
      await load(keep, range);
    }).catch((error) => { at.place && (at.place.textContent = `The viewer could not show this study (${error.name}).`); });
    return queue;
  }

  document.addEventListener("click", (event) => {
    const link = event.target.closest && event.target.closest('a[href*="#finding-"]');
    if (!link) return;
    event.preventDefault();
    finding(Number(link.getAttribute("href").split("#finding-")[1]));
  }, true);

  window.omnimri = { show, goTo, finding, view };
})();
