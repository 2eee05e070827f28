/** The columns of arbiter.status(), as PostgREST prints them. */
export interface ExecutionStatus {
  readonly environment: 'local' | 'cloud' | 'none';
  readonly can_write_local: boolean;
  /** False while no table is in mode enforce: the browser may then write. */
  readonly enforced: boolean;
  readonly code: 'cloud_active' | 'cooling_down' | 'takeover_unconfirmed' | null;
  readonly message: string;
  readonly retry_at: string | null;
  readonly machine_id: string | null;
  readonly machine_state: 'starting' | 'running' | 'stopping' | 'stopped' | 'error' | 'deleted' | null;
  readonly heartbeat_age: string | null;
  readonly epoch: number | null;
  readonly draining: boolean;
  readonly as_of: string;
  readonly poll_interval: string;
}

/** The result of a write, as supabase-js gives it; `status` is 0 when nothing was sent or no answer came. */
export interface WriteResult<Data = unknown> {
  data: Data | null;
  error: { code: string; message: string; details: string; hint: string } | null;
  status: number;
}

/** The part of a supabase-js client that this module uses. */
export interface SupabaseLike {
  from(table: string): any;
  rpc(name: string): any;
  schema(name: string): any;
}

export interface ArbiterOptions {
  schema?: string;
  root?: Document | ShadowRoot | Element | null;
}

export interface ArbiterEventMap {
  change: CustomEvent<ExecutionStatus | null>;
  cloudstart: CustomEvent<ExecutionStatus>;
  cloudstop: CustomEvent<ExecutionStatus>;
  resume: CustomEvent<ExecutionStatus>;
  confirm: CustomEvent<ExecutionStatus>;
}

export class Arbiter extends EventTarget {
  constructor(supabase: SupabaseLike, options?: ArbiterOptions);
  start(): void;
  stop(): void;
  refresh(): Promise<void>;
  readonly status: ExecutionStatus | null;
  readonly canGenerate: boolean;
  readonly canConfirm: boolean;
  readonly remaining: number | null;
  readonly error: { message: string } | null;
  insert<Data = unknown>(
    table: string,
    rows: object | object[],
    options?: { select?: string | boolean },
  ): Promise<WriteResult<Data>>;
  write<Result extends { error: unknown }>(build: () => PromiseLike<Result>): Promise<Result | WriteResult<never>>;
  confirmTakeover(): Promise<WriteResult<ExecutionStatus>>;
  addEventListener<Type extends keyof ArbiterEventMap>(
    type: Type,
    listener: (event: ArbiterEventMap[Type]) => void,
    options?: boolean | AddEventListenerOptions,
  ): void;
  addEventListener(
    type: string,
    listener: EventListenerOrEventListenerObject | null,
    options?: boolean | AddEventListenerOptions,
  ): void;
}

declare class ArbiterElement extends HTMLElement {
  arbiter: Arbiter | null;
}

export class ArbiterBadge extends ArbiterElement {}

export class ArbiterToasts extends ArbiterElement {
  show(text: string): void;
}

export class ArbiterConfirm extends ArbiterElement {
  open(): void;
}

declare global {
  interface HTMLElementTagNameMap {
    'arbiter-badge': ArbiterBadge;
    'arbiter-toasts': ArbiterToasts;
    'arbiter-confirm': ArbiterConfirm;
  }
}
